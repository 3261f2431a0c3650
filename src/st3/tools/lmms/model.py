"""The model that lmms-eval asks: any supported checkpoint, trimmed by any policy."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval import utils
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from loguru import logger
from tqdm import tqdm

import st3
from st3.methods import DEFAULT_POLICY
from st3.methods.policies import parse
from st3.tools.common.chats import Asker
from st3.tools.common.images import to_rgb
from st3.tools.common.load import load
from st3.tools.lmms.settings import arguments, ends, policy_text


class TrimmedModel(lmms):
    """lmms-eval's `st3`.

    ``--model_args`` (its commas separate arguments, so those of the policy may stand by
    themselves: ``policy=fastv,drop=0.75`` and ``policy=fastv:layer=2,drop=0.75`` are both read)::

        pretrained             a folder or hub id; default: the bundled st3-tiny
        policy                 default: thirds; "none" is the untrimmed model; a file of st3 tune
        budget                 mean share of the visual tokens over the layers, 0.35 or 35%
        dtype                  auto, bfloat16, float16, float32
        attn_implementation    sdpa, eager, flash_attention_2
        trust_remote_code      True, False
        system_prompt          text in front of every conversation
        anything else          an argument of the policy

    Raises:
        ValueError: an unknown policy, or an argument that the policy does not take.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str | None = None,
        policy: str = DEFAULT_POLICY,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        system_prompt: str | None = None,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.policy = parse(policy_text(policy, options))
        self.accelerator = Accelerator()
        self._rank = self.accelerator.local_process_index
        self._world_size = self.accelerator.num_processes
        several = self._world_size > 1
        self._device = self.accelerator.device if several or device is None else device
        loaded = load(pretrained, self._device, dtype, trust_remote_code, attn_implementation)
        self.model = loaded.model
        if not getattr(loaded.processor, "chat_template", None):
            raise ValueError(f"{loaded.name} has no chat template, which lmms-eval's prompts need")
        self.asker = Asker(self.model, loaded.processor)
        self.batch_size = int(batch_size)
        self.system_prompt = system_prompt
        self._told: set[str] = set()
        with st3.trim(self.model, self.policy):  # refuses here what it would refuse at the first
            pass

    @property
    def tokenizer(self) -> Any:
        return self.asker.processor.tokenizer

    @property
    def device(self) -> Any:
        return self.model.device

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers to lmms-eval's requests, in their order."""
        ordered = utils.Collator(
            [request.args for request in requests],
            lambda args: (-len(str(args[0])), str(args[0])),
            group_fn=lambda args: args[2],
            grouping=True,
        )
        results: list[GenerationResult] = []
        shares: list[float] = []
        bar = tqdm(total=len(requests), disable=self.rank != 0, desc=f"st3: {self.policy}")
        for chunk in ordered.get_batched(n=self.batch_size, batch_fn=None):
            settings = dict(chunk[0][2])
            chats = [self._chat(*args) for args in chunk]
            tokens, share = self._answer(chats, settings)
            shares += [share] * len(chats)
            for args, text, row in zip(chunk, self.asker.texts(tokens), tokens, strict=True):
                for end in ends(settings):
                    text = text.partition(end)[0]
                count = TokenCounts(output_tokens=len(self.asker.cut(row)))
                results.append(GenerationResult(text=text.strip(), token_counts=count))
                self.cache_hook.add_partial("generate_until", (args[0], settings), text)
            bar.update(len(chats))
        bar.close()
        if shares:
            mean = sum(shares) / len(shares)
            logger.info(f"st3 policy {self.policy}: mean visual share {mean:.1%}")
        return list(ordered.get_original(results))

    def _chat(
        self, context: str, messages: Any, settings: Any, number: int, task: str, split: str
    ) -> list[dict[str, Any]]:
        said = ChatMessages(messages=messages(self.task_dict[task][split][number]))
        if any(part.type not in ("text", "image") for m in said.messages for part in m.content):
            raise ValueError(f"task {task!r} shows more than images and text: not supported")
        chat: list[dict[str, Any]] = said.to_hf_messages()
        for message in chat:
            for part in message["content"]:
                if part["type"] == "image":
                    part["image"] = to_rgb(part["image"])
        chat = self._apply_system_prompt(chat, self.system_prompt)
        return chat

    @torch.no_grad()
    def _answer(
        self, chats: list[list[dict[str, Any]]], settings: dict[str, Any]
    ) -> tuple[Any, float]:
        """New tokens [B, n], and the mean visual share (1 without images)."""
        inputs = self.asker.encode(chats)
        told, left_out = arguments(settings)
        if new := [name for name in left_out if name not in self._told]:
            self._told.update(new)
            logger.warning(f"st3 has no setting {', '.join(new)}: left out")
        with st3.trim(self.model, self.policy) as trimmer:
            output = self.model.generate(**inputs, **told)
            images = any(part["type"] == "image" for m in chats for t in m for part in t["content"])
            share = trimmer.report.mean_share if images else 1.0
        return output[:, inputs["input_ids"].shape[1] :], share

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError(
            "st3 generates answers: choose a task of output_type generate_until"
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError(
            "st3 answers single rounds in lmms-eval; `st3 eval` has conversations"
        )
