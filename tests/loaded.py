"""Loads every library that a command may need, for the process that tests fork others from; see forked.py."""

import gc
import importlib
import pkgutil

import stripe

for module in pkgutil.walk_packages(stripe.__path__, "stripe."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
for name in ("onnx", "pytorch_lightning", "sklearn.datasets", "torchvision"):  # without onnxruntime, which has threads
    importlib.import_module(name)
gc.freeze()  # or every fork would copy all that was loaded, to look for garbage in it
