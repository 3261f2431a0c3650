"""Look at the attention of the last token while a model runs, layer by layer, and keep none of it.

A watcher rides on the engine's attention functions: each decoder layer's queries and keys pass by,
the attention of the last row is computed from them and handed to a :class:`Listener`, which reduces
it at once. The layer's own attention function then runs on its own inputs, so that the model's
output is bitwise what it is without a watcher, on a bare model and on a trimmed one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from st3.engine.append import Append
from st3.engine.masks import as_bool
from st3.engine.plan import Attend
from st3.engine.prefill import Prefill
from st3.engine.trimmer import MODEL_ATTRIBUTE, Trimmer
from st3.errors import TrimStateError, UnsupportedModelError
from st3.hf.attention import ATTRIBUTE, LayerHandle, base_attention, registered
from st3.hf.call import cache_in
from st3.hf.hooks import Hooks
from st3.methods.scores import LayerView
from st3.models import VisualTokens, family_of, find_parts

ONE_ROW = (
    "a watched model runs one prompt with an image at a time, without padding, beams or copies"
)


@dataclass(frozen=True)
class Prompt:
    """The prompt that is watched.

    Attributes:
        length: its tokens.
        visual: [V] ascending columns of its visual tokens, on the model's device.
    """

    length: int
    visual: Tensor

    @property
    def device(self) -> torch.device:
        return self.visual.device


class Listener(Protocol):
    """Takes what a watcher sees. Step 0 is the prefill, step t the t-th decode step."""

    def prompt(self, prompt: Prompt) -> None:
        """A prompt's prefill starts."""

    def layer(self, layer: int, attention: Tensor, columns: Tensor) -> None:
        """One layer of a pass.

        Args:
            attention: [K] softmax attention of the last token over the keys that the layer sees,
                mean over the query heads, fp32.
            columns: [K] int, each key's place in the untrimmed sequence; the same tensor for all
                layers of a pass that see the same keys.
        """

    def done(self, step: int) -> None:
        """All layers of a pass have been heard."""


class Watch:
    """Attaches a listener to a model, trimmed or not, for the length of a ``with`` block.

    Raises:
        UnsupportedModelError: a model or attention kernel that st3 does not support.
        TrimStateError: on entering, if the model is being watched already or decodes compiled; in
            a pass, if it is not of one unpadded row.
    """

    def __init__(self, model: nn.Module, listener: Listener) -> None:
        family_of(model)
        self.model = model
        self.listener = listener
        self.parts = find_parts(model)
        self.count = len(self.parts.layers)
        self.current: Prompt | None = None
        self._trimmer: Trimmer | None = None
        self._own_visual: VisualTokens | None = None
        self._hooks = Hooks()
        self._stored: dict[int, Tensor] = {}
        self._ranges: dict[int, Tensor] = {}
        self._step = 0
        self._mask: Any = None
        self._listening = False

    # Life cycle -------------------------------------------------------------------------------

    def __enter__(self) -> Watch:
        self._trimmer = self.model.__dict__.get(MODEL_ATTRIBUTE)
        before = [module.__dict__.get(ATTRIBUTE) for module in self.parts.attentions]
        if any(isinstance(handle, _Spy) for handle in before):
            raise TrimStateError("this model is being watched already")
        if self._trimmer is not None and (
            self._trimmer.compile_decode or self._trimmer.policy.rerank
        ):
            raise TrimStateError(
                "a run that decodes compiled, or ranks tokens anew while it decodes, cannot be "
                "watched: leave out compile_decode, and rerank_every, recall_every or dycoke"
            )
        text, inner, hooks = self.parts.text, self.parts.inner, self._hooks
        attention = text.config._attn_implementation or "eager"
        if before[0] is None:  # not trimmed, or by a policy that touches nothing
            name = registered(attention)
            configs = {id(m.config): m.config for m in (text, *self.parts.attentions)}
            for config in configs.values():
                hooks.assign(config, "_attn_implementation", name)
        for index, module in enumerate(self.parts.attentions):
            handle = before[index] or LayerHandle(index, base_attention(attention, module))
            hooks.replace(module, ATTRIBUTE, _Spy(self, handle))
        if self._trimmer is None:
            self._own_visual = VisualTokens(self.model, inner)
            self._own_visual.listen(hooks)
        hooks.before(inner, self._on_inner)
        hooks.before(text, self._on_text)
        hooks.after(text, self._after_text)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._hooks.restore()
        self._own_visual = None
        self._stored.clear()
        self._ranges.clear()
        self.current = self._trimmer = self._mask = None

    # Passes -----------------------------------------------------------------------------------

    def _on_inner(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._mask = kwargs.get("attention_mask")
        if self._own_visual is not None:
            self._own_visual.begin(kwargs)

    def _on_text(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._listening = False
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            return
        cache = cache_in(kwargs)
        past = cache.get_seq_length() if cache is not None else 0
        listened = self._own_visual or (self._trimmer and self._trimmer._director.visual)
        mask = listened.mask if listened else None
        if mask is not None and bool(mask.any()):
            if past or len(mask) != 1 or not self._whole():
                raise TrimStateError(ONE_ROW)
            visual = mask[0].clone()
            visual[-1] = False  # the engine never counts a prompt's very last token
            self.current = Prompt(embeds.shape[1], visual.nonzero().flatten().to(embeds.device))
            self._stored.clear()
            self._step, self._listening = 0, True
            self.listener.prompt(self.current)
        elif self.current is not None and past:
            if embeds.shape[0] != 1 or embeds.shape[1] != 1:
                raise TrimStateError(ONE_ROW)
            self._step, self._listening = past - self.current.length + 1, True

    def _whole(self) -> bool:
        mask = self._mask
        return not isinstance(mask, Tensor) or mask.dim() != 2 or bool(mask.all())

    def _after_text(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._listening:
            self._listening = False
            self._ranges.clear()
            self.listener.done(self._step)

    # Layers -----------------------------------------------------------------------------------

    @torch.no_grad()
    def see(
        self, handle: LayerHandle, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]
    ) -> None:
        """Hand the attention of a layer's last row to the listener."""
        prompt = self.current
        if not self._listening or prompt is None:
            return
        layer, inside = handle.layer, handle.current
        end = prompt.length + self._step  # of the untrimmed sequence, the new token included
        if isinstance(inside, Prefill):
            columns = inside.block.source_columns()[0]
        elif isinstance(inside, Append):
            past = inside.cache[layer]
            first = min(past.row_starts(self._step))
            if past.window is None:
                stored, new = self._stored[layer][first:], end - prompt.length
            else:  # which may have given up text since
                new = query.shape[2]
                stored = past.positions(first)[0, :-new]
            appended = torch.arange(end - new, end, device=key.device)
            columns = torch.cat([stored.to(key.device), appended])
        elif inside is not None:  # joined rows, compiled steps
            raise TrimStateError(ONE_ROW)
        else:
            columns = self._columns(end, key)
        valid = self._valid(layer, mask, columns, end)
        attention = last_row(layer, query, key, kwargs, valid)
        self.listener.layer(layer, attention, columns)

    def _valid(self, layer: int, mask: Any, columns: Tensor, end: int) -> Tensor | None:
        """[1, K] bool, the keys that the last query sees; None when it sees them all."""
        if isinstance(mask, Tensor) and mask.dim() == 4:
            return as_bool(mask[:, 0, -1, : len(columns)])
        window = self.parts.windows[layer]  # flash attention has no mask but the window itself
        if window is not None and end > window:
            return (columns > end - 1 - window)[None]
        return None

    def _columns(self, end: int, key: Tensor) -> Tensor:
        """The last keys of an untrimmed sequence of ``end`` tokens, once for all layers."""
        first = end - key.shape[2]
        found = self._ranges.get(first)
        if found is None or len(found) != key.shape[2]:
            found = self._ranges[first] = torch.arange(first, end, device=key.device)
        return found

    def note_order(self, handle: LayerHandle) -> None:
        """Note in which order a trimmed layer is given the prompt, at the end of the pass."""
        inside = handle.current
        if not self._listening or not isinstance(inside, Prefill) or inside.cache is None:
            return
        held = inside.cache[handle.layer]

        def noted(
            order: Callable[[], Tensor | None], positions: Tensor, *rest: Any, **more: Any
        ) -> None:
            del held.__dict__["store"]
            found = order()
            stored = positions if found is None else positions.gather(1, found)
            self._stored[handle.layer] = stored[0]
            held.store(lambda: found, positions, *rest, **more)

        held.__dict__["store"] = noted

    def stored(self, layer: int) -> Tensor | None:
        """[M] columns of the prompt as the cache of a trimmed layer holds them: its visual tokens
        first, those that annealing drops first standing first. None if the layer is not trimmed."""
        return self._stored.get(layer)


class _Spy:
    """Stands where a layer's handle stands, and is the pass to which its attention is given."""

    __slots__ = ("handle", "watch")

    def __init__(self, watch: Watch, handle: LayerHandle) -> None:
        self.watch = watch
        self.handle = handle

    @property
    def layer(self) -> int:
        return self.handle.layer

    @property
    def base(self) -> Attend:
        return self.handle.base

    @property
    def current(self) -> _Spy:
        return self

    def attend(
        self, layer: int, base: Attend, module: Any, query: Tensor, key: Tensor, value: Tensor,
        mask: Tensor | None, kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        self.watch.see(self.handle, query, key, mask, kwargs)
        inside = self.handle.current
        if inside is None:
            return base(module, query, key, value, mask, **kwargs)
        self.watch.note_order(self.handle)
        return inside.attend(layer, base, module, query, key, value, mask, kwargs)


def last_row(
    layer: int, query: Tensor, key: Tensor, kwargs: dict[str, Any], valid: Tensor | None
) -> Tensor:
    """Softmax attention of the last query of one row, mean over the heads, [K] fp32.

    Args:
        query: [1, heads, N, size]; key: [1, KV heads, K, size].
        valid: [1, K] bool, the keys that it sees; None when all are.

    Raises:
        UnsupportedModelError: attention with learned sinks, which take a share of their own.
    """
    if kwargs.get("s_aux") is not None:
        raise UnsupportedModelError("attention with learned sinks cannot be watched")
    columns = query.shape[2]
    view = LayerView.of(
        query,
        key,
        kwargs,
        layer=layer,
        hidden=None,
        visual=torch.zeros(1, columns, dtype=torch.bool, device=key.device),
        ordinal=torch.zeros(1, columns, dtype=torch.long, device=key.device),
        last=torch.tensor([columns - 1], device=key.device),
        key_valid=valid,
    )
    return view.last_row_logits().softmax(dim=-1).mean(dim=1)[0]
