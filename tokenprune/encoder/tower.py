"""Both ends of a multimodal model: tokens are merged inside its vision tower and stay fewer at its decoder.

The tower hands on all patches, each with the value of its group, so that the projector and the placeholders of the text
fit. Behind the projector the patches of a group are equal bit for bit (which the hook on it sees to, whatever order a
matrix product sums in), and a method that takes part before the decoder keeps one of them. Nothing has to be remembered
between tower and decoder, so it makes no difference when and how often features are computed.
"""

from typing import Any, cast

from torch import Tensor, nn

from tokenprune.decoder.adapter import DecoderAdapter
from tokenprune.encoder.adapter import EncoderAdapter
from tokenprune.encoder.block_split import first_argument
from tokenprune.encoder.run_state import SITE
from tokenprune.errors import OptionError, UnsupportedModelError
from tokenprune.hooks import Hook, Swap
from tokenprune.ops.equal import equal_tokens
from tokenprune.reduction import gather
from tokenprune.session import Session
from tokenprune.signals import Trace
from tokenprune.upstream.encoders import ONE_TO_ONE, n_used, projector_of, tower_of

_PACKED = "its vision tower packs the patches of all images into one sequence, with windows or groups of patches in it"
_SHUFFLED = "its visual tokens are pooled, shuffled or broken into lines behind the tower: none represents one patch"
PACKED = ("glm4v", "mistral3", "molmo2", "ovis2", "qwen2_vl", "qwen2_5_vl", "qwen3_5", "qwen3_vl")


class _DecoderEnd:
    """The session as the decoder sees it: its traces are published together with those of the tower."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def publish(self, traces: tuple[Trace, ...]) -> None:
        """Make `traces` those of the last forward, behind what the tower left where the decoder saw images."""
        if any(trace.n_in for trace in traces):
            traces = (*(trace for trace in self._session.traces if trace.site == SITE), *traces)
        self._session.publish(traces)


class MultimodalAdapter:
    """Sites of a multimodal model, those inside its vision tower among them.

    Args:
        decoder: the adapter of the decoder.

    Raises:
        UnsupportedModelError: the tower cannot be reduced, or what it hands on is no longer one token a patch.
    """

    def __init__(self, decoder: DecoderAdapter) -> None:
        self.decoder = decoder
        self.family = decoder.family
        root = decoder.root
        name, what = decoder.family, "tokens cannot be merged inside the vision tower of"
        if name not in ONE_TO_ONE:
            reason = _PACKED if name in PACKED else _SHUFFLED if decoder.row.ids else "it has none that is known"
            raise UnsupportedModelError(
                f"{what} {type(root).__name__} ({name}): {reason}; families where they can are {', '.join(ONE_TO_ONE)}"
            )
        host, tower = tower_of(root)
        if reason := tower.refusal(host):
            raise UnsupportedModelError(f"{what} {type(root).__name__}: {reason}")
        self.projector = projector_of(root)
        self.encoder = EncoderAdapter(host, tower, n_used=n_used(root, name, len(tower.blocks(host))))

    def preflight(self, *, sites: tuple[str, ...], positions: str) -> None:
        """Check that the model has `sites`.

        Raises:
            OptionError: it has not, or its positions cannot follow the policy.
        """
        self.decoder.preflight(sites=tuple(site for site in sites if site != SITE), positions=positions)

    def hooks(self, session: Session) -> list[Hook | Swap]:
        """The hooks of both ends, and the one that keeps merged tokens equal behind the projector.

        Raises:
            OptionError: a method does not fit one of the ends.
        """
        if not all(method.restore for method in session.methods_at(SITE)):
            raise OptionError(
                f"restore=False was asked for, but the text of {self.family} has a placeholder for every patch, each "
                "of which the tower has to hand on; merged tokens are left out before the decoder: use restore=True"
            )

        def equalise(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
            if not isinstance(output, Tensor) or not session.active:
                return None
            x = first_argument(args, kwargs)
            return gather(output, equal_tokens(x).first) if x.shape[:2] == output.shape[:2] else None

        return [
            *self.decoder.hooks(cast(Session, _DecoderEnd(session))),
            *self.encoder.hooks(session, alone=False),
            Hook(self.projector, "first", equalise),
        ]
