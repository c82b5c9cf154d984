"""The real download, with shorter pauses and another disk: `python download_fakes.py MODEL_ID`."""

import os
import sys

from kagami_launcher.download import __main__, run

if __name__ == "__main__":
    if pause := os.environ.get("FAKE_PAUSE_S"):
        run._PAUSES_S = (float(pause),) * len(run._PAUSES_S)
    if free := os.environ.get("FAKE_FREE_BYTES"):
        run._free_bytes = lambda folder: int(free)
    code = __main__.main()
    sys.stdout.flush()
    os._exit(code)
