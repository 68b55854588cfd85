"""What every worker shares: a request a line on standard input, an answer a line on standard output.

Nothing but the standard library: the workers run in other programs' environments.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

Verb = Callable[..., Any]


def answer(make: Callable[..., tuple[Mapping[str, Any], Mapping[str, Verb]]]) -> None:
    """Build from the options of the first argument, say what there is to say, then do what each line asks.

    A line is {"do": verb, ...arguments}; its answer is {"done": result} or {"error": one line}.
    """
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints must not come between the answers
    facts, verbs = make(**json.loads(sys.argv[1]))
    print(json.dumps({"done": facts}), file=lines)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            reply = {"done": verbs[asked.pop("do")](**asked)}
        except Exception as error:  # others' programs may raise anything; the other subjects go on
            reply = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        print(json.dumps(reply), file=lines)


def gaps(arrivals: list[float]) -> list[float]:
    """Seconds between one token and the next."""
    return [later - sooner for sooner, later in pairwise(arrivals)]
