"""Random damage for as long as one likes: `python -m tests.fuzz_files --minutes 10`; exit code 1 at any fault."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.malformed_files import damaged, find_fault


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz_files", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    end_s, seed, files, read, faults = time.monotonic() + 60 * args.minutes, args.seed, 0, 0, 0
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "a.safetensors"
        while time.monotonic() < end_s:
            for name, content in damaged(seed, 1000):
                file.write_bytes(content)
                fault, sound = find_fault(file)
                files, read = files + 1, read + sound
                if fault:
                    faults += 1
                    print(f"{name}: {fault}", flush=True)
            seed += 1
    print(
        f"{files:,} files of seeds {args.seed} to {seed - 1}: {read:,} read, {files - read:,} refused, {faults} faults"
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
