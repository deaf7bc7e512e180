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

# Which tokens of a pass a layer is handed: all of them; some, in an order of its own (an expert of a mixture); or the
# last columns (the output layer, under logits_to_keep).
Sees = Literal["all", "some", "last"]

# Where, on a CPU, a group's bases and A are one product, and its B another: a product of bfloat16 takes some 17 µs
# before it multiplies anything (in float32: 3), and q, k, v, A in one 0.6 of the time of four (8 rows of SmolLM2-135M,
# two cores with AVX-512). With more rows the products gain nothing, and attention loses by outputs that are not
# contiguous: prefill 8 × 256 took 1.2 times as long. In float32 the library is slower on the joined matrix.
JOINED = (torch.bfloat16,)
JOINED_ROWS = 64


class GatedLinear(nn.Module):
    """A linear base module plus its traits' LoRAs, stacked along the rank.

    Parameters
    ----------
    base: nn.Linear, transformers' Conv1D or a quantised linear; its weights' values never change, but for stretches on
        merged weights. Where they are joined their storage moves.
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
            # the way through nn.Module.__getattr__ would double what an idle layer adds to its base (3.7 µs, not 1.6)
            return self._modules["base"](x, *args, **kwargs)  # type: ignore[misc]
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
        self._stack: Tensor | None = None  # [R of all, in]; where joined, with the bases' weights in front
        self._blocks: Tensor | None = None  # [out of all, R of all], where joined
        self._route: Route | None = None  # of the plan in force
        self._routes: dict[bool, Route] = {}  # for few rows and for many; what outlives a plan

    def output(self, member: GatedLinear, x: Tensor, plan: GatePlan) -> Tensor:
        """The output of `member` for x [..., in]."""
        if torch.compiler.is_compiling():
            return _outputs([member], x, plan, member.a)[0]
        if self._input is not x or self._plan is not plan or id(member) not in self._ready:
            outputs = self._all_outputs(x, plan)
            if len(self.members) == 1:
                return outputs[0]
            self._input, self._plan = x, plan
            self._ready = {id(m): y for m, y in zip(self.members, outputs, strict=True)}
        y = self._ready.pop(id(member))
        if not self._ready:
            self._input = self._plan = None
        return y

    def forget(self) -> None:
        """Let go of outputs that nobody picked up, and of the plan."""
        self._ready, self._input, self._plan, self._route = {}, None, None, None
        for route in self._routes.values():
            route.let_go()

    def _all_outputs(self, x: Tensor, plan: GatePlan) -> list[Tensor]:
        if torch.is_grad_enabled() or x.is_cuda:  # on GPUs the kernel also serves passes without gradients
            return _differentiable(self.members, x, plan)
        route = self._route
        if route is None or not route.serves(x, plan):
            route = self._route = self._route_for(x, plan)
            if route is None:
                return _outputs(self.members, x, plan, self.stacked())
            route.take(x, plan)
        return route.outputs(x)

    def _route_for(self, x: Tensor, plan: GatePlan) -> Route | None:
        """None where a pass has to go another way."""
        first = self.members[0]
        if plan.start or not _is_placed(first, x, plan) or torch.is_autocast_enabled(x.device.type):
            return None
        few = x.is_cpu and x.shape[0] * x.shape[1] <= JOINED_ROWS
        route = self._routes.get(few)
        if route is not None and not route.is_of(self.members, x):
            self._routes, route = {}, None  # both, or the other would keep weights that nobody uses
        if route is None:
            if not all(is_plain(m.base) and _alike(m.weight, m.a, x) for m in self.members):
                return None
            route = self._new_route(few and x.dtype in JOINED)
            if not _is_distributed():  # there its stack is a copy
                self._routes[few] = route  # making all anew for every reply took 8 ms of SmolLM2-135M's first token
        return route

    def _new_route(self, joined: bool) -> Route:
        if joined and self._join():
            return JoinedRoute(self.members, self._stack, self._blocks)  # type: ignore[arg-type]
        return Route(self.members, self.stacked())

    def stacked(self) -> Tensor:
        """[R of all, in]: the members' A in one matrix, of which their own become views: no copy is kept."""
        if len(self.members) == 1:
            return self.members[0].a
        parts = [m.a for m in self.members]
        if _is_distributed():
            return torch.cat([*parts])  # a sharded model owns its weights' storage, so nothing may be moved there
        if not _are_views(parts, self._stack):
            self._stack_up([*parts])
        return self._stack[-sum(len(a) for a in parts) :]  # type: ignore[index]

    def _join(self) -> bool:
        """Join the bases' weights and all A in one matrix, all B in another; False where something speaks against it.

        All become views. The matrix of B is block diagonal: its zeros are all that joining adds to memory.
        """
        weights = [m.weight for m in self.members]
        rows, columns = [*weights, *(m.a for m in self.members)], [m.b for m in self.members]
        if _are_views(rows, self._stack) and _are_views(columns, self._blocks):
            return True
        alone = all(weight.untyped_storage().nbytes() == weight.nbytes for weight in weights)
        if not alone or self.members[0].sees == "last" or _is_distributed():
            return False
        self._stack_up(rows)
        with torch.inference_mode(False):
            self._blocks = torch.block_diag(*[b.data for b in columns])
            down = self._blocks.split([b.shape[0] for b in columns])
            ranks = [b.shape[1] for b in columns]
            _point(columns, [part.split(ranks, dim=1)[k] for k, part in enumerate(down)])
        return True

    def _stack_up(self, parts: list[Tensor]) -> None:
        self._routes = {}  # they would keep what is moved here
        with torch.inference_mode(False):  # or a later training could not save the weights for its backward pass
            self._stack = torch.cat([part.data for part in parts])
            _point(parts, self._stack.split([len(part) for part in parts]))

    def split(self) -> None:
        """Give stacked and joined weights storage of their own again, bit for bit."""
        self.forget()
        self._routes = {}
        for m in self.members:
            held = [part for part in (m.a, m.weight) if _are_views([part], self._stack)]
            held += [m.b] if _are_views([m.b], self._blocks) else []
            _point(held, [part.data.clone(memory_format=torch.contiguous_format) for part in held])
        self._stack = self._blocks = None


def _are_views(parts: Sequence[Tensor], whole: Tensor | None) -> bool:
    """Whether they are views of it: load_state_dict(assign=True) and the like give them other storage."""
    if whole is None:
        return False
    start = whole.untyped_storage().data_ptr()
    return all(part.untyped_storage().data_ptr() == start for part in parts)


def _point(owners: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    for owner, tensor in zip(owners, tensors, strict=True):
        owner.data = tensor


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class Route:
    """The shortest way to a group's outputs: all that can be looked up has been, for the weights and then for a plan.

    At one token a row the products of a gated layer take less time than Python takes to find their arguments. `take`
    comes before the first pass of a plan. Between plans weights may be replaced by others, which `is_of` tells; during
    one they may only be written to (and a bias not even that).
    """

    plan: GatePlan | None = None

    def __init__(self, members: list[GatedLinear], a: Tensor) -> None:
        self.a_t = a.T
        self.ranks, self.scalings = [m.ranks for m in members], members[0].scalings
        self.widths = [m.a.shape[0] for m in members]
        # detached, so that their storage is kept and no other weight can come to lie in its place
        self.parts = [(m.weight.detach(), None if m.bias is None else m.bias.detach(), m.b.T) for m in members]
        self.made_from = _sources(members)

    def is_of(self, members: list[GatedLinear], x: Tensor) -> bool:
        """Whether these still have the weights, ranks and scalings that it was made from."""
        return x.dtype is self.a_t.dtype and self.made_from == _sources(members)

    def take(self, x: Tensor, plan: GatePlan) -> None:
        """Serve inputs like x under this plan."""
        self.columns = plan.flat_columns(self.ranks, self.scalings, x)
        self.plan, self.shape = plan, x.shape[:2]  # last: an error above leaves nothing that looks served

    def let_go(self) -> None:
        """Of the plan and its gates."""
        if self.plan is not None:
            self.plan = None
            del self.columns

    def serves(self, x: Tensor, plan: GatePlan) -> bool:
        """Whether it took inputs like x under this plan."""
        return self.plan is plan and x.shape[:2] == self.shape and x.dtype == self.columns.dtype

    def outputs(self, x: Tensor) -> list[Tensor]:
        flat = x.flatten(0, 1)
        shrunk = torch.mm(flat, self.a_t).mul_(self.columns).split_with_sizes(self.widths, dim=1)
        return [
            F.linear(flat, weight, bias).addmm_(s, b_t).view(*self.shape, -1)
            for (weight, bias, b_t), s in zip(self.parts, shrunk, strict=True)
        ]


class JoinedRoute(Route):
    """One product for the bases and A, one for B: the outputs are views of all of them together.

    stack: [out of all + R of all, in]. blocks: [out of all, R of all], with one block a member.
    """

    def __init__(self, members: list[GatedLinear], stack: Tensor, blocks: Tensor) -> None:
        super().__init__(members, stack[len(blocks) :])
        self.stack, self.blocks_t = stack, blocks.T
        self.cut, self.outs = blocks.shape, [m.out_features for m in members]

    def take(self, x: Tensor, plan: GatePlan) -> None:
        self.bias = self._joined_bias()
        super().take(x, plan)

    def outputs(self, x: Tensor) -> list[Tensor]:
        y, shrunk = F.linear(x.flatten(0, 1), self.stack, self.bias).split_with_sizes(self.cut, dim=1)
        y.addmm_(shrunk.mul_(self.columns), self.blocks_t)
        return [part.view(*self.shape, -1) for part in y.split_with_sizes(self.outs, dim=1)]

    def _joined_bias(self) -> Tensor | None:
        """[out of all + R of all], zero where there is none; None where no member has one."""
        if all(bias is None for _, bias, _ in self.parts):
            return None
        parts = [self.stack.new_zeros(len(weight)) if bias is None else bias for weight, bias, _ in self.parts]
        return torch.cat([*parts, self.stack.new_zeros(sum(self.widths))])


def _sources(members: list[GatedLinear]) -> list[tuple[Any, ...]]:
    """What a route is made from, with the places where weights lie: load_state_dict(assign=True), merging and the like
    put others in their stead."""
    return [(m.ranks, m.scalings, *_places(m.base, m.a, m.b)) for m in members]


def _places(base: nn.Module, a: Tensor, b: Tensor) -> list[int]:
    tensors = (base.weight, base.bias, a, b) if is_plain(base) else ()
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]  # type: ignore[union-attr,operator]


def _is_placed(member: GatedLinear, x: Tensor, plan: GatePlan) -> bool:
    """Whether x is [batch, tokens, in], every token in the place that the plan gives it."""
    return x.dim() == 3 and x.shape[:2] == (plan.batch, plan.tokens) and member.sees != "some"


def is_plain(base: nn.Module) -> bool:
    """A linear whose forward is the product alone: not quantised or parametrised, no hooks (nor accelerate's)."""
    hooked = base._forward_hooks or base._forward_pre_hooks or "forward" in vars(base)
    return type(base) is nn.Linear and type(base.weight) is nn.Parameter and not hooked


def _alike(x: Tensor, y: Tensor, z: Tensor) -> bool:
    return x.dtype is y.dtype is z.dtype and x.device == y.device == z.device


def _outputs(members: list[GatedLinear], x: Tensor, plan: GatePlan, a: Tensor) -> list[Tensor]:
    if torch.is_grad_enabled() or not _is_placed(members[0], x, plan):
        return _differentiable(members, x, plan)
    return _tail(members, x, plan, a)


def _differentiable(members: list[GatedLinear], x: Tensor, plan: GatePlan) -> list[Tensor]:
    """Through the kernel, whose dispatch picks dense products or Triton; gradients; any leading shape."""
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


def _tail(members: list[GatedLinear], x: Tensor, plan: GatePlan, a: Tensor) -> list[Tensor]:
    """The base on all tokens, the traits only from the first gated column on: prompts stay bitwise the base's.

    a: [R of all members, in]. The weights of q/k/v or gate/up are not joined into one product: at 8 rows of SmolLM2
    that took 1.2 times as long as one product each (two AVX2 cores), while their shrink together costs one call.
    """
    tail = x[:, plan.start :] if plan.start else x
    shrunk = F.linear(tail.to(a.dtype), a)
    shrunk = shrunk * plan.columns([m.ranks for m in members], members[0].scalings, shrunk)
    outputs = []
    for member, s in zip(members, shrunk.split([m.a.shape[0] for m in members], dim=-1), strict=True):
        y = member.base(x)
        if plan.start == 0 and y.is_contiguous() and y.dtype == s.dtype:
            y.view(-1, y.shape[-1]).addmm_(s.flatten(0, 1), member.b.T.to(s.dtype))
        else:
            y[:, plan.start :] += (s @ member.b.T.to(s.dtype)).to(y.dtype)
        outputs.append(y)
    return outputs
