"""eight_devices.py FOLDER: everything that tests ask of eight devices, which XLA simulates on a CPU, as JSON."""

import json
import sys
from pathlib import Path

import adapted
import devices
import evaluate_devices
import quantized

if __name__ == "__main__":
    results = {
        "training": devices.main(Path(sys.argv[1])),
        "evaluation": evaluate_devices.main(),
        "adapters": adapted.main(),
        "quantization": quantized.main(),
    }
    print(json.dumps(results))
