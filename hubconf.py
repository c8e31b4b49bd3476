"""`torch.hub.load("OWNER/REPOSITORY", "net", pretrained=True)`; with source="local", a path instead."""

import importlib.util
import os
import sys

dependencies = ["torch", "safetensors"]

# model.py under a name of its own: the project that calls torch.hub may have a model.py, too.
NAME, FILE = "cifar10_model", os.path.join(os.path.dirname(os.path.abspath(__file__)), "model.py")


def net(pretrained: bool = False, **kwargs):
    """The CIFAR-10 classifier of model.py: images (N, 3, H, W), normalised, to logits (N, 10).

    Args:
        pretrained: with the weights of the recorded run, in evaluation mode; else fresh ones.
        kwargs: those of `Net.from_pretrained`, or else of `Net`.
    """
    if getattr(sys.modules.get(NAME), "__file__", None) != FILE:
        spec = importlib.util.spec_from_file_location(NAME, FILE)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[NAME] = module  # where pickle looks for the class
    Net = sys.modules[NAME].Net
    return Net.from_pretrained(**kwargs) if pretrained else Net(**kwargs)
