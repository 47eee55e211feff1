"""The errors of a builder whose input is at fault.

BuildError             shown to the user as one line: what is wrong, and what to do
├── CheckpointError    a file of the checkpoint is missing, unreadable or not what it claims
└── UnsupportedError   the checkpoint is sound, but nothing here can run it
"""


class BuildError(Exception):
    """The build can't go on; the message is one line that says what is wrong and what to do."""


class CheckpointError(BuildError):
    """A file of the checkpoint is missing, unreadable or not what it claims to be."""


class UnsupportedError(BuildError):
    """The checkpoint needs something that this project doesn't have."""
