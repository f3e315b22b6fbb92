"""What stays on the clients: the bundle that is published for it, what the settings ask of it, and what clients do."""

from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
from msgspec import Meta

from broker_server.consistency import check_no_whole_model
from edge_client.bundle import Bundle, with_manifest
from edge_client.errors import BundleError, ConfigError
from edge_client.manifest import with_personal
from edge_client.wire.messages import PersonalPlan

if TYPE_CHECKING:
    from broker_server.config import Federation  # whose section is here

_PULL = 0.1


class Personal(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``[personal]``: what a client learns for itself alone."""

    layers: str | tuple[str, ...] = ()
    """Patterns of the names of parameters and running statistics that stay on each client, such as ``head.*``; ``norm``
    is all of the layers that keep running statistics, such as batch normalisation. Those that the bundle names stay
    there as well."""
    head_epochs: Annotated[int, Meta(ge=0, le=10_000)] = 0
    """Above 0 the layers that stay are trained first, for so many epochs, and then the others without them; with 0 all
    are trained at once."""
    method: Literal["none", "ditto", "fine-tune"] = "none"
    """Whether each client has a whole model of its own: one that it trains and keeps, held near the global one; or the
    global one, trained on its data before it is used."""
    pull: Annotated[float, Meta(ge=0, le=1e9)] | None = msgspec.field(default=None, name="lambda")
    """With ditto, how strongly it is held: 0 is not at all. 0.1 unless given."""
    epochs: Annotated[int, Meta(ge=1, le=10_000)] = 1
    """With ditto and fine-tune, over its data in a task. ``steps`` above 0 replaces it."""
    steps: Annotated[int, Meta(ge=0, le=10_000_000)] = 0
    hypers: dict[
        Annotated[str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_.]{0,63}\Z")], Annotated[float, Meta(ge=-1e9, le=1e9)]
    ] = {}
    """In place of those of ``[train]`` for what is trained for the client alone."""

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns of ``layers``."""
        return (self.layers,) if isinstance(self.layers, str) else self.layers


def publishable(data: bytes, section: Personal) -> bytes:
    """The bundle that clients get: that of these bytes, with the roles that ``personal.layers`` asks for.

    Raises:
        BundleError: the bytes are no intact bundle, or ``personal.layers`` does not fit it.
    """
    patterns = section.patterns
    try:
        return with_manifest(data, lambda manifest: with_personal(manifest, patterns)) if patterns else data
    except BundleError as error:
        raise BundleError(f"federation.bundle: {error}") from error


def personal_plan(section: Personal) -> PersonalPlan:
    """What a client does for itself, as its invitations say it."""
    return PersonalPlan(
        method=section.method,
        epochs=section.epochs,
        steps=section.steps,
        pull=(_PULL if section.pull is None else section.pull) if section.method == "ditto" else 0.0,
        head_epochs=section.head_epochs,
        hypers=section.hypers,
    )


def check_personal(settings: "Federation", bundle: Bundle) -> None:
    """Find what ``[personal]`` asks for and the bundle cannot do, before every client declines every task for it.

    Raises:
        ConfigError: it is, and the message says what to do.
    """
    section, manifest = settings.personal, bundle.manifest
    known = manifest.defaults()
    if unknown := sorted(set(section.hypers) - set(known)):
        raise ConfigError(
            f"personal.hypers.{unknown[0]} is not a hyperparameter of bundle {manifest.name!r}; "
            f"known there: {', '.join(sorted(known))}"
        )
    if section.method == "ditto" and not manifest.proximal:
        raise ConfigError(
            f'personal.method = "ditto" needs the proximal term, which bundle {manifest.name!r} has not; '
            "export it with --proximal"
        )
    if not bundle.kept.size:
        stop = settings.stop
        if (
            stop.metric.startswith("personal_")
            and section.method == "none"
            and (stop.target is not None or stop.patience)
        ):
            raise ConfigError(
                f"stop.metric is {stop.metric!r}, and clients have no model for themselves; "
                "set personal.layers or personal.method"
            )
        if section.head_epochs:
            raise ConfigError(
                f"personal.head_epochs is {section.head_epochs} and no layer stays on the clients; "
                "set personal.layers, or remove it"
            )
        return
    if section.method == "ditto":
        raise ConfigError(
            f'personal.method = "ditto" cannot be combined with the personal layers of bundle {manifest.name!r}; '
            "export it without --personal"
        )
    if not manifest.layout("personal").size and (section.head_epochs or section.method == "fine-tune"):
        key = "head_epochs" if section.head_epochs else "method"
        raise ConfigError(
            f"personal.{key} trains the personal layers alone, and here they are running statistics only; "
            "let personal.layers match parameters, or remove it"
        )
    check_no_whole_model(settings, f"the personal layers of bundle {manifest.name!r}")
