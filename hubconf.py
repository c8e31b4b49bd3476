"""For `torch.hub.load("OWNER/REPOSITORY", "net", pretrained=True)`, or a path with `source="local"`."""

import importlib.util
import os
import sys

dependencies = ["torch", "safetensors"]

# model.py gets another name, because the project that calls torch.hub may also have a model.py.
NAME = "cifar10_model"
FILE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "model.py")


def net(pretrained: bool = False, **kwargs):
    """The CIFAR-10 classifier of model.py: images (N, 3, H, W), normalised, to logits (N, 10).

    Args:
        pretrained: True gives the weights of the recorded run, in evaluation mode; False random weights.
        kwargs: arguments of `Net.from_pretrained` if pretrained, else of `Net`.

    Raises:
        TypeError: pretrained and num_classes: the weights are those of ten classes.
    """
    if pretrained and "num_classes" in kwargs:
        found = f"num_classes={kwargs['num_classes']}"
        advice = f"call reset_classifier({kwargs['num_classes']}) of the network that you get"
        raise TypeError(f"expected path or dropout beside pretrained=True, found {found}: {advice}")
    if getattr(sys.modules.get(NAME), "__file__", None) != FILE:
        spec = importlib.util.spec_from_file_location(NAME, FILE)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[NAME] = module  # pickle looks for the class here
    Net = sys.modules[NAME].Net
    return Net.from_pretrained(**kwargs) if pretrained else Net(**kwargs)
