"""``safeft VERB``: one file a verb, each with a configuration, ``main`` and nothing else.

This module imports nothing heavy, so that ``safeft --help`` answers at once.
"""

import atexit
import os
import sys
from collections.abc import Sequence
from importlib import import_module

VERBS = {
    "demo": "the whole story on a small model that ships with safeft, in minutes",
    "sites": "what of a model can be named: towers, layers, units",
    "locate": "find the safety neurons of a chat model",
    "shield": "what languages share: locate, compare, tune only that, measure the transfer",
    "validate": "check that refusal hangs on them, against random sets of equal size",
    "audit": "does refusal hang on one neuron, on a few, on many? tests them, gates a release",
    "sft": "supervised fine-tuning (all of `trl sft`) with the neurons frozen",
    "dpo": "preference tuning (all of `trl dpo`) with the neurons frozen",
    "detox": "find the units that drive toxic output, turn them down, in the weights too",
    "verify": "compare base and tuned weights, bit by bit",
    "evaluate": "refusal, over-refusal, domain, drift",
    "guard": "harmfulness from inner activations: fit, score, stream, evaluate, serve",
    "report": "what finished runs kept of refusal for what they learnt: a page",
    "env": "versions and devices, for bug reports",
}

_USAGE = """usage: safeft VERB [--config FILE.yaml] [--key value ...]

Fine-tune a chat model on your domain, keep its refusals, and prove both.

{verbs}

`safeft VERB --help` lists the keys of a verb; a YAML file gives them defaults.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code (0 done, 1 verdict is no, 2 cannot be done)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help", "help"):
        width = max(map(len, VERBS))
        rows = "\n".join(f"  {verb:<{width}}  {text}" for verb, text in VERBS.items())
        print(_USAGE.format(verbs=rows))
        return 0 if given else 2
    if given[0] == "--version":
        from safeft import __version__

        print(__version__)
        return 0
    verb, rest = given[0], given[1:]
    if verb not in VERBS:
        from difflib import get_close_matches

        close = get_close_matches(verb, VERBS, 1)
        hint = f"; did you mean {close[0]!r}?" if close else f" ({', '.join(VERBS)})"
        print(f"safeft: error: there is no verb {verb!r}{hint}", file=sys.stderr)
        return 2
    from safeft.errors import SafeftError

    try:
        return _end(int(import_module(f"safeft.commands.{verb}").main(rest)))
    except SafeftError as error:
        print(f"safeft {verb}: error: {error}", file=sys.stderr)
        return _end(2)
    except BrokenPipeError:  # The reader (`| head`) has seen enough.
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        print(f"safeft {verb}: interrupted", file=sys.stderr)
        return 130


def _end(code: int) -> int:
    """Among other processes, end here and now; alone, just give the code back.

    Threads of gloo may abort the interpreter's last clean-up, and a launcher takes that for a
    failure of a run whose files are all written.
    """
    from safeft.progress import launched

    if launched() > 1:
        atexit._run_exitfuncs()  # trackers finish their runs there
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
