"""PRO on rankings beside DPO on pairs of the best answer against the rest, in gold reward, on the built-in language.

    python benchmarks/listwise.py                # five minutes of one core

Trains everything it needs; see `fastalign.demo.listwise`. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time

from harness import commit, device_name, versions
from transformers.utils import logging

from fastalign.demo.listwise import compare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lists", type=int, default=1024, help="of four ranked answers")
    parser.add_argument("--questions", type=int, default=1024, help="of a test")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning_rates", type=float, nargs="+", help="of every way, instead of its own three")
    options = parser.parse_args()
    logging.disable_progress_bar()

    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        found = compare(
            folder, seeds=options.seeds, learning_rates=options.learning_rates, ranked_questions=options.lists,
            questions=options.questions,
        )  # fmt: skip
    figures = {
        "options": vars(options),
        "provenance": {"commit": commit(), "versions": versions(), "device": device_name("cpu")},
        "cpu_seconds": round(time.process_time() - start, 1),
        **found.to_json(),
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
