"""Prints the seconds from the first import to the first prediction; `bench.py` runs it in fresh processes."""

import sys
import time
from pathlib import Path

start = time.perf_counter()
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataset import ASSETS, CLASSES, AlbumentationsCIFAR10, test_transform
from model import Net
from utils import predict

images = AlbumentationsCIFAR10(ASSETS, train=False).data
predict(Net.from_pretrained(), images[0], test_transform(), CLASSES)
print(time.perf_counter() - start)
