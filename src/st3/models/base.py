"""One model family: all that differs between models, behind one object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from st3.cost.dims import Lookahead, TextDims
from st3.cost.vision import VisionDims, vision_flops
from st3.errors import UnsupportedModelError
from st3.methods.scores.base import needs_of, spares_of
from st3.methods.scores.looks import Look, looks_of
from st3.models.decoders import closed_form
from st3.models.grids import Grids, grids_of, no_grids
from st3.models.layouts import Layout, UnknownPlaces
from st3.models.meta import counted, counted_crop
from st3.models.parts import Parts, base_model, find_parts
from st3.models.pixels import PixelTap
from st3.models.rotary import Unrotate, inverse_rotation
from st3.models.tower_attention import REMEDY, TowerTap
from st3.models.towers import has_class_token, tower_of
from st3.models.visual import Encoded, VisualTokens
from st3.models.ways import Way

_NOT_UNDERSTOOD = (UnknownPlaces, KeyError, IndexError, RuntimeError, AttributeError, TypeError)


@dataclass(frozen=True)
class Family:
    """One model family: what st3 must know of it, in fields, or in methods that a subclass
    overrides. Models may come wrapped by peft.

    Attributes:
        model_type: ``config.model_type`` of its models.
        name: how people call it.
        notes: what a user should know.
        video: whether videos are trimmed too.
        layout: how an image becomes visual tokens.
        way: from the tower's patches to visual tokens, so that what the tower attends to can be
            followed to them; None where it is not known.
    """

    model_type: str
    name: str
    notes: str = ""
    video: bool = False
    layout: Layout = Layout()  # noqa: RUF009 (it holds nothing)
    way: Way | None = None

    # Where things are --------------------------------------------------------------------------

    def parts(self, model: nn.Module) -> Parts:
        """The modules that the engine hooks into.

        Raises:
            UnsupportedModelError: if the model is laid out otherwise, with the reason.
        """
        return find_parts(model)

    def visual_tokens(self, model: nn.Module, parts: Parts) -> VisualTokens:
        """What listens for which tokens of a prompt are visual.

        Args:
            model: bare, or wrapped by peft.
            parts: of the same model.
        """
        return VisualTokens(base_model(model), parts.inner)

    def tower(self, model: nn.Module, parts: Parts, looks: Sequence[Look]) -> TowerTap:
        """What listens for what the vision tower attends to.

        Args:
            model: bare, or wrapped by peft.
            parts: of the same model.
            looks: which layers of the tower to read, and how.

        Raises:
            UnsupportedModelError: if the family's way from patches to visual tokens is not known,
                or its tower's layers are not.
        """
        config: Any = base_model(model).config
        vision = getattr(config, "vision_config", None)
        if self.way is None:
            tower = getattr(vision, "model_type", "") or "unknown"
            raise UnsupportedModelError(
                f"{self.model_type}: what its vision tower ({tower}) attends to cannot be followed "
                f"to the visual tokens: {REMEDY}"
            )
        return TowerTap(config, parts.inner, looks, self.way, has_class_token(vision))

    def tap(
        self, model: nn.Module, parts: Parts, score: Any, active: bool = True
    ) -> TowerTap | PixelTap | None:
        """What listens to the vision tower, or for the pixels of images, if the score asks.

        Args:
            model: bare, or wrapped by peft.
            parts: of the same model.
            score: of a policy.
            active: whether the policy drops anything; if not, nothing is listened to.

        Raises:
            UnsupportedModelError: if it is not known how they become visual tokens, and the score
                has no other way.
        """
        needs = needs_of(score) if active else ()
        if "tower" in needs:
            spare = "tower" in spares_of(score)
            try:
                tap = self.tower(model, parts, looks_of(score))
            except UnsupportedModelError:
                if spare:
                    return None
                raise
            tap.may_lack = spare
            return tap
        if "pixels" in needs:
            return PixelTap(base_model(model), parts.inner, self.layout, score.of_pixels)
        return None

    def inverse_rotation(self, parts: Parts) -> Unrotate:
        """What takes RoPE off queries and keys.

        Raises:
            UnsupportedModelError: if the family rotates in a way that cannot be undone.
        """
        return inverse_rotation(parts)

    # Where tokens lie --------------------------------------------------------------------------

    def image_grids(
        self, model: nn.Module, encoded: Sequence[Encoded], images: Sequence[Sequence[int]]
    ) -> Grids:
        """The grid of tokens of each image of a prompt.

        Args:
            encoded: what its images were encoded from (:attr:`VisualTokens.encoded`).
            images: for each row the visual tokens of each image: each run of visual tokens, or what
                the encoder said of images that touch.

        Returns:
            (rows, columns) for each image, or (frames, rows, columns), laid out as ``images``; None
            for images whose tokens are no grid, or not known to be one. May wait for the device.
        """
        counts = [count for row in images for count in row]
        try:
            rasters = list(self.layout.all_rasters(base_model(model), encoded, counts))
        except _NOT_UNDERSTOOD:
            return no_grids(images)
        return grids_of(images, rasters)

    # What it costs -----------------------------------------------------------------------------

    def lookahead(self, text: Any, window: int | None) -> Lookahead:
        """Which later positions a token may see in a layer.

        Args:
            text: the config of the text model.
            window: of the layer, in tokens; None: it has none.
        """
        return "none"

    def text_dims(self, config: Any) -> TextDims:
        """The dimensions of the text decoder: by a closed form, or else counted.

        Raises:
            ValueError: a decoder whose cost is not described, and cannot be counted.
        """
        return closed_form(config, self.lookahead) or counted(self, config)

    def tower_dims(self, config: Any) -> VisionDims:
        """The dimensions of the vision tower and its projector.

        Raises:
            ValueError: a tower or projector whose cost is not described.
        """
        dims = self.project(tower_of(config), config)
        if dims is None:
            raise ValueError(
                f"no cost model for the way from the vision tower of {config.model_type!r} to its "
                "visual tokens: describe it with VisionDims(...) by hand"
            )
        return dims

    def project(self, tower: VisionDims, config: Any) -> VisionDims | None:
        """The tower with its projector; None if that is not described.

        Args:
            tower: without the projector.
            config: of the whole model.
        """
        return None

    def tower_flops(self, config: Any, n_visual: int, crops: int | None = None) -> int:
        """FLOPs that make ``n_visual`` visual tokens, the projector included: by a closed form, or
        else counted, where the tower takes crops of one size.

        Args:
            crops: how many crops the tower sees; None: as many as give ``n_visual`` tokens.

        Raises:
            ValueError: a tower whose cost is not described, and cannot be counted.
        """
        try:
            dims = self.tower_dims(config)
        except ValueError as error:
            flops, tokens = counted_crop(self, config, error)
            return flops * (max(1, round(n_visual / tokens)) if crops is None else crops)
        return vision_flops(dims, n_visual, crops)

    # How it is measured ------------------------------------------------------------------------

    def bench_inputs(self, model: nn.Module, visual: int, batch: int) -> dict[str, Any] | None:
        """Random arguments of ``get_image_features``; None where st3 cannot make any.

        Args:
            model: bare, or wrapped by peft; the arguments are on its device, in its dtype.
            visual: tokens of each row, about.
            batch: rows.
        """
        model = base_model(model)
        try:
            dims = self.tower_dims(model.config)
        except ValueError:
            return None
        return self.layout.bench_inputs(model, dims, visual, batch)
