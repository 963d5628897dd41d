"""eight_devices.py FOLDER SUBJECT...: prints results of the eight-device tests as JSON. XLA simulates the devices."""

import json
import sys
from pathlib import Path

import adapted
import devices
import evaluate_devices
import quantized
import shared_contexts

SUBJECTS = {
    "training": lambda folder: devices.main(folder),
    "evaluation": lambda folder: evaluate_devices.main(),
    "adapters": lambda folder: adapted.main(),
    "quantization": lambda folder: quantized.main(),
}

if __name__ == "__main__":
    folder, *chosen = sys.argv[1:]
    shared_contexts.install()
    print(json.dumps({name: run(Path(folder)) for name, run in SUBJECTS.items() if name in chosen}))
