"""The exception tree of omniport.

::

    OmniportError
    ├── UserError                 bad input or usage: exit code 2, printed without a traceback
    │   ├── UsageError            flags or arguments that do not go together
    │   │   └── TurnEnded         a turn that was committed, cancelled or ended by an error before
    │   ├── MediaError            audio, image or video that cannot be read or used
    │   ├── PromptError           messages that cannot become a prompt
    │   │   └── PromptTooLong     more tokens than the KV cache holds
    │   ├── UnknownVoice          a voice the bundle does not have
    │   ├── BundleError           a bundle that is missing, corrupt, newer than this release, or hostile
    │   ├── CheckpointError       a folder or id that is not a usable Qwen2.5-Omni checkpoint
    │   ├── ExportError           an export that cannot go on (disk full, missing extra, bad options)
    │   ├── BuildError            an engine that cannot be built from a graph, or would not be what the graph says
    │   └── BackendError          a backend that is not installed or cannot run this bundle
    ├── Busy                      as many replies are made, and wait, as may; later it may go
    └── CheckFailed               a check ran and did not hold: exit code 1

Every message says what happened, what was got, what was expected, and what to do next.
"""

from __future__ import annotations


class OmniportError(Exception):
    """Base of every error omniport raises on purpose."""

    exit_code = 1


class UserError(OmniportError):
    """Bad input or usage; the command line exits with 2 and prints no traceback."""

    exit_code = 2


class UsageError(UserError):
    """Flags or arguments that do not go together."""


class TurnEnded(UsageError):
    """A turn that was committed, cancelled or ended by an error before; ``session.turn()`` begins another."""


class MediaError(UserError):
    """Audio, image or video that cannot be read or used."""


class PromptError(UserError):
    """Messages that cannot become a prompt."""


class PromptTooLong(PromptError):
    """The prompt needs more positions than the KV cache holds."""


class UnknownVoice(UserError):
    """The bundle has no voice of that name; the message lists the known ones."""


class BundleError(UserError):
    """A bundle that is missing, corrupt, newer than this release, or hostile."""


class CheckpointError(UserError):
    """A folder or id that is not a usable Qwen2.5-Omni checkpoint."""


class ExportError(UserError):
    """An export that cannot go on: disk full, missing extra, bad options."""


class BuildError(UserError):
    """An engine that cannot be built from a graph, or that would not be what the graph says."""


class BackendError(UserError):
    """A backend that is not installed or cannot run this bundle."""


class Busy(OmniportError):
    """As many replies are made at once, and as many wait, as the session was opened for.

    Attributes:
        seconds: after which a reply that is asked for may find a place, as far as the last ones tell.
    """

    def __init__(self, replies: int, waiting: int, seconds: float) -> None:
        super().__init__(
            f"{replies} replies at once and {waiting} that wait are as many as this session was opened for "
            f"(max_replies, max_waiting); try again in {seconds:.1f} s"
        )
        self.seconds = seconds


class CheckFailed(OmniportError):
    """A check ran and did not hold."""
