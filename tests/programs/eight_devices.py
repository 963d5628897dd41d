"""eight_devices.py FOLDER: prints the results of the eight-device tests as JSON. XLA simulates the devices."""

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
