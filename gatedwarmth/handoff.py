"""Watches a reply being generated and hands over from its warm opening to the later gates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from gatedwarmth.errors import GateError
from gatedwarmth.gates import NEVER, GateSchedule, Policy, sentence_ends


class HandoffWatch(LogitsProcessor):
    """A logits processor that changes no logits: it is called with all tokens of every row after each step.

    The first token computed with the later gates is the one after the opening's last.
    """

    def __init__(
        self, schedule: GateSchedule, policy: Policy, tokenizer: PreTrainedTokenizerBase, prompt_length: int
    ) -> None:
        self.schedule, self.policy, self.tokenizer, self.prompt_length = (
            schedule,
            policy,
            tokenizer,
            prompt_length,
        )

    def check(self, kwargs: dict[str, Any]) -> None:
        config = kwargs.get("generation_config")
        beams = kwargs.get("num_beams") or (config.num_beams if config is not None else 1) or 1
        if beams > 1 or kwargs.get("assistant_model") is not None:
            raise GateError(
                "a handoff follows one text as it grows; use it without beams and without an assistant model"
            )

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        generated = input_ids[:, self.prompt_length :]
        if self.schedule.switched is None:
            self.schedule.switched = torch.full((input_ids.shape[0],), NEVER, device=input_ids.device)
        for row in (self.schedule.switched == NEVER).nonzero().flatten().tolist():
            if self._opening_over(generated[row]):
                self.schedule.switched[row] = self.schedule.offset + input_ids.shape[1]
                self.schedule.switch_at[row] = int(generated.shape[1])
        return scores

    def _opening_over(self, ids: Tensor) -> bool:
        if self.policy.tokens:
            return len(ids) >= self.policy.tokens
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        return sentence_ends(text) >= self.policy.sentences
