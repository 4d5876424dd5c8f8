"""Nothing here runs in an environment that was set up before websockets became part of the `test` extra."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("websockets") else ["test_*.py"]
