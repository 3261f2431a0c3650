"""Worker side: follows one model runner, from its model to each of its batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from st3.methods.scores import needs_of
from st3.vllm import layers
from st3.vllm.attention import mean_over_ranks
from st3.vllm.batch import CURRENT, Batch, Share
from st3.vllm.plan import Plan
from st3.vllm.prompt import Prompt
from st3.vllm.settings import Settings

logger = logging.getLogger("vllm.st3")


class Follower:
    """Lays the plan on a runner's model, and notes each batch before its attention metadata is
    built.

    Attributes:
        alive: gives the ids of the requests that the runner knows.
        block: gives the slots of a block, known once the runner has its cache.
        known: what was found of each request when its first tokens were computed.
    """

    def __init__(
        self, asked: Settings, alive: Callable[[], Collection[str]], block: Callable[[], int]
    ) -> None:
        self.asked, self.alive, self.block = asked, alive, block
        self.plan: Plan | None = None
        self.known: dict[str, Share] = {}

    def attach(self, model: Any) -> None:
        """Lay the plan on a loaded model.

        Raises:
            ValueError: layers or an attention backend that st3 does not know.
        """
        self.plan = self.asked.plan(len(model.get_language_model().model.layers))
        if self.plan is None:
            return
        layers.attach(model, self.plan)
        logger.info(
            "st3 trims with %s: %d KV cache groups of %d layers",
            self.plan.policy,
            self.plan.groups,
            self.plan.group_size,
        )

    def idle(self) -> None:
        """A pass without requests follows."""
        CURRENT.batch = None

    def begin(
        self,
        names: Any,
        starts: Any,
        computed: Any,
        lengths: Any,
        features: Callable[[str, int], Any],
        wants_all: Callable[[str, int], bool],
    ) -> None:
        """A pass over these requests follows.

        Args:
            names: the requests' ids.
            starts: first row of each, and the end.
            computed: tokens of each that are in the cache.
            lengths: tokens of each one's prompt.
            features, wants_all: multimodal features of a request, and whether it wants every row.
        """
        if self.plan is None:
            return
        shares, block = [], self.block()
        for i, name in enumerate(names):
            start, done = int(starts[i]), int(computed[i])
            new = int(starts[i + 1]) - start
            share = self.known.get(name)
            # Less in the cache than it had: preempted, or another request of the same id.
            if share is None or done < share.computed + share.length:
                found = features(name, i)
                prompt = Prompt.of(int(lengths[i]), found, wants_all(name, i))
                if "grids" in needs_of(self.plan.score):
                    prompt = replace(prompt, grids=prompt.grids_from(found))
                trims = self.plan.trims(prompt, done, new, block)
                share = self.known[name] = Share(start, new, done, prompt, trims)
            share.start, share.length, share.computed = start, new, done
            shares.append(share)
        if len(self.known) > 2 * len(self.alive()) + 1024:
            self.known = {name: self.known[name] for name in self.alive() if name in self.known}
        CURRENT.batch = Batch(self.plan, shares, block, mean_over_ranks)
