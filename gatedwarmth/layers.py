"""GatedLinear: a base module and its stacked traits; siblings that read one input share their work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatedwarmth.errors import GateError
from gatedwarmth.gates import GatePlan, GatesInForce
from gatedwarmth.kernels import gated_lora_siblings

# Up to this many tokens q/k/v (or gate/up) and their A run as one product: fewer calls matter more than a copy there.
FUSED_TOKENS = 64

# Which tokens of a pass a layer is handed: all of them; some, in an order of its own (an expert of a mixture); or the
# last columns (the output layer, under logits_to_keep).
Sees = Literal["all", "some", "last"]


class GatedLinear(nn.Module):
    """A linear base module plus its traits' LoRAs, stacked along the rank.

    Parameters
    ----------
    base: nn.Linear, transformers' Conv1D or a quantised linear; called as it is, never changed.
    a: [R, in], b: [out, R]: the traits' lora_A rows and lora_B columns in the model's trait order.
    ranks, scalings: one entry a trait; rank 0 where a trait leaves this layer alone.
    in_force: where the gates of the pass under way are found. sees: which tokens of a pass the layer is handed.
    """

    def __init__(
        self,
        base: nn.Module,
        a: Tensor,
        b: Tensor,
        ranks: tuple[int, ...],
        scalings: tuple[float, ...],
        in_force: GatesInForce,
        sees: Sees = "all",
    ) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(a, requires_grad=False)
        self.b = nn.Parameter(b, requires_grad=False)
        self.ranks, self.scalings = ranks, scalings
        self.dropout = 0.0
        self.in_force, self.sees = in_force, sees
        self.siblings = Siblings([self])

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plan = self.in_force.plan
        if plan is None:
            return self.base(x, *args, **kwargs)
        return self.siblings.output(self, x, plan)

    @property
    def weight(self) -> Tensor:
        """The base's weight: some models read a projection's dtype or device from it."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias  # type: ignore[return-value]

    @property
    def in_features(self) -> int:
        return self.a.shape[1]

    @property
    def out_features(self) -> int:
        return self.b.shape[0]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> GatedLinear:
        self.siblings.split()  # moving or casting gives the weights storage of their own
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"ranks={self.ranks}, scalings={self.scalings}"


class Siblings:
    """GatedLinears that read one input, in the order in which they are called; most have no sibling.

    The first one called computes all outputs and the others pick theirs up. That is right only while they are handed
    the very same tensor in the very same pass; another tensor or pass simply starts anew.
    """

    def __init__(self, members: list[GatedLinear]) -> None:
        self.members = members
        self._ready: dict[int, Tensor] = {}
        self._input: Tensor | None = None
        self._plan: GatePlan | None = None
        self._fused: Fused | None = None

    def output(self, member: GatedLinear, x: Tensor, plan: GatePlan) -> Tensor:
        """The output of `member` for x [..., in]."""
        if len(self.members) == 1 or torch.compiler.is_compiling():
            return self._outputs([member], x, plan)[0]
        if self._input is not x or self._plan is not plan or id(member) not in self._ready:
            self._input, self._plan = x, plan
            outputs = self._outputs(self.members, x, plan)
            self._ready = {id(m): y for m, y in zip(self.members, outputs, strict=True)}
        y = self._ready.pop(id(member))
        if not self._ready:
            self._input = self._plan = None
        return y

    def forget(self) -> None:
        """Let go of outputs that nobody picked up."""
        self._ready, self._input, self._plan = {}, None, None

    def split(self) -> None:
        """Give fused base weights storage of their own again, bit for bit."""
        if self._fused is not None:
            self._fused.restore()
            self._fused = None

    def _outputs(self, members: list[GatedLinear], x: Tensor, plan: GatePlan) -> list[Tensor]:
        placed = x.dim() == 3 and x.shape[:2] == (plan.batch, plan.tokens) and members[0].sees != "some"
        if torch.is_grad_enabled() or not placed:
            if torch.is_grad_enabled() and any(m.a.requires_grad or m.b.requires_grad for m in members):
                self.split()  # an optimiser may write to the adapters next, and fused ones leave no version behind
            return _differentiable(members, x, plan)
        few = plan.start == 0 and x.shape[0] * x.shape[1] <= FUSED_TOKENS
        few = few and not torch.is_autocast_enabled(x.device.type)  # the fused product has one dtype
        if few and len(members) == len(self.members) and self._can_fuse(x):
            if self._fused is not None and self._fused.stale():
                self.split()
            self._fused = self._fused or Fused(members)
            return self._fused.outputs(x, plan)
        return _tail(members, x, plan)

    def _can_fuse(self, x: Tensor) -> bool:
        if self._fused is not None:
            return self._fused.matrix.dtype == x.dtype
        # A sharded model owns its weights' storage, so nothing may be moved there.
        sharded = torch.distributed.is_available() and torch.distributed.is_initialized()
        return not sharded and all(_is_plain(m.base) and _alike(m.weight, m.a, x) for m in self.members)


def _is_plain(base: nn.Module) -> bool:
    """A linear whose forward is the product alone: not quantised or parametrised, no hooks (nor accelerate's)."""
    hooked = base._forward_hooks or base._forward_pre_hooks or "forward" in vars(base)
    return type(base) is nn.Linear and type(base.weight) is nn.Parameter and not hooked


def _alike(*tensors: Tensor) -> bool:
    return len({(tensor.dtype, tensor.device) for tensor in tensors}) == 1


def _differentiable(members: list[GatedLinear], x: Tensor, plan: GatePlan) -> list[Tensor]:
    """Through the kernel, with gradients; any leading shape."""
    bases = [m.base(x) for m in members]
    dtype = bases[0].dtype
    first = members[0]
    gates = _gates_of_rows(first, x, plan, bases[0])
    flat = F.dropout(x.reshape(-1, x.shape[-1]).to(dtype), first.dropout, first.training)
    outputs = gated_lora_siblings(
        flat,
        [m.a.to(dtype) for m in members],
        [m.b.to(dtype) for m in members],
        gates,
        [m.ranks for m in members],
        [y.reshape(-1, y.shape[-1]) for y in bases],
    )
    return [out.view_as(y) for out, y in zip(outputs, bases, strict=True)]


def _gates_of_rows(layer: GatedLinear, x: Tensor, plan: GatePlan, like: Tensor) -> Tensor:
    """[rows, traits]: the scaled gates of x's rows, x [..., in] flattened to [rows, in]."""
    rows, given = x.numel() // x.shape[-1], plan.batch * plan.tokens
    lead = tuple(x.shape[:-1])
    if layer.sees == "all" and lead[:2] == (plan.batch, plan.tokens):  # [batch, tokens, heads, in]: one gate a token
        flat = plan.flat(layer.scalings, like)
        return flat if rows == given else flat.repeat_interleave(rows // given, dim=0)
    if layer.sees == "all" and lead in ((given,), (1, given)):
        return plan.flat(layer.scalings, like)
    if layer.sees == "last" and len(lead) == 2 and lead[0] == plan.batch and lead[1] <= plan.tokens:
        gates = plan.flat(layer.scalings, like).view(plan.batch, plan.tokens, -1)
        return gates[:, plan.tokens - lead[1] :].flatten(0, 1)
    return _uniform(plan, layer.scalings, like).expand(rows, -1)


def _uniform(plan: GatePlan, scalings: tuple[float, ...], like: Tensor) -> Tensor:
    gates = plan.flat(scalings, like)
    if not torch.equal(gates, gates[:1].expand_as(gates)):
        raise GateError(
            "a gated layer sees only some of the tokens (a mixture of experts?), so gates that differ between tokens "
            "cannot be placed; use one gate for all tokens, or leave this layer out of the adapter"
        )
    return gates[:1]


def _tail(members: list[GatedLinear], x: Tensor, plan: GatePlan) -> list[Tensor]:
    """The base on all tokens, the traits only from the first gated column on: prompts stay bitwise the base's."""
    tail = x[:, plan.start :] if plan.start else x
    a = members[0].a if len(members) == 1 else torch.cat([m.a for m in members])
    shrunk = F.linear(tail.to(a.dtype), a).split([m.a.shape[0] for m in members], dim=-1)
    outputs = []
    for member, s in zip(members, shrunk, strict=True):
        y = member.base(x)
        s = s * plan.columns(member.ranks, member.scalings, s)
        part = y[:, plan.start :]
        if plan.start == 0 and y.is_contiguous() and y.dtype == s.dtype:
            y.view(-1, y.shape[-1]).addmm_(s.reshape(-1, s.shape[-1]), member.b.T.to(s.dtype))
        else:
            part += (s @ member.b.T.to(s.dtype)).to(y.dtype)
        outputs.append(y)
    return outputs


class Fused:
    """[W; A] of all siblings in one matrix, of which their own weights become views: no copy is kept.

    y and the shrink of all siblings are one product, their expands one more (B block-diagonal).
    """

    def __init__(self, members: list[GatedLinear]) -> None:
        self.members = members
        weights = [m.weight for m in members]
        self.widths = [w.shape[0] for w in weights]
        self.ranks = tuple(r for m in members for r in m.ranks)
        self.scalings = members[0].scalings
        self.columns_key = tuple(m.ranks for m in members)
        self.matrix = torch.cat([w.data for w in weights] + [m.a.data for m in members])
        self.total = sum(self.widths)
        self.b = torch.block_diag(*[m.b.data for m in members]).T.contiguous()
        biases = [m.bias for m in members]
        self.bias: Tensor | None = None
        if any(bias is not None for bias in biases):
            pairs = zip(weights, biases, strict=True)
            parts = [w.new_zeros(w.shape[0]) if bias is None else bias.data for w, bias in pairs]
            self.bias = torch.cat([*parts, self.matrix.new_zeros(self.matrix.shape[0] - self.total)])
        self._point(self.matrix.split([*self.widths, *(m.a.shape[0] for m in members)]))
        self._versions = self._current_versions()

    def stale(self) -> bool:
        """Whether an optimiser has written to the adapters since they were fused."""
        return self._versions != self._current_versions()

    def _current_versions(self) -> list[int]:
        return [m.a._version + m.b._version for m in self.members]

    def outputs(self, x: Tensor, plan: GatePlan) -> list[Tensor]:
        product = F.linear(x, self.matrix, self.bias)
        columns = torch.cat([plan.columns(r, self.scalings, x) for r in self.columns_key], dim=-1)
        flat = product.view(-1, product.shape[-1])
        scaled = product[..., self.total :] * columns
        flat[:, : self.total].addmm_(scaled.view(-1, scaled.shape[-1]), self.b)
        return list(product[..., : self.total].split(self.widths, dim=-1))

    def restore(self) -> None:
        weights = [m.weight.data.clone() for m in self.members]
        self._point([*weights, *(m.a.data.clone() for m in self.members)])

    def _point(self, tensors: Sequence[Tensor]) -> None:
        owners = [*(m.weight for m in self.members), *(m.a for m in self.members)]
        for owner, tensor in zip(owners, tensors, strict=True):
            owner.data = tensor
