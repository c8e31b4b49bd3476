"""`torch.hub.load("OWNER/REPOSITORY", "net", pretrained=True)`; with source="local", a path instead."""

dependencies = ["torch", "safetensors"]

from model import Net  # noqa: E402  (torch.hub checks the dependencies first)


def net(pretrained: bool = False, **kwargs) -> Net:
    """The CIFAR-10 classifier of model.py: images (N, 3, H, W), normalised, to logits (N, 10).

    Args:
        pretrained: with the weights of the recorded run, in evaluation mode; else fresh ones.
        kwargs: those of `Net.from_pretrained`, or else of `Net`.
    """
    return Net.from_pretrained(**kwargs) if pretrained else Net(**kwargs)
