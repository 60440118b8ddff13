r"""Small recorded runs that ship with the package.

`cifar10-se-resnet20` is an SE-ResNet-20's attention on 500 test images of CIFAR-10: one gate of each stage, six of
twenty epochs, as float16, thinned from the run that its metrics.csv is of::

    python scripts/train.py --depth 20 --module senet --dataset hf:../shared/data/cifar10 --epochs 20 --lr 0.1 \
        --scheduler cosine --weight-decay 5e-4 --amp bf16 --manualSeed 1 --record 1000 --squeeze -c runs/se20
    python scripts/make_example.py runs/se20 --epochs 1 2 4 8 14 20 --gates layer1.0 layer2.0 layer3.1 \
        --dtype float16 --out stripe/examples/cifar10-se-resnet20
"""

from pathlib import Path

from stripe.store import Run, open_run

EXAMPLE_RUN = "cifar10-se-resnet20"
_HERE = Path(__file__).parent


def load_example(name: str = EXAMPLE_RUN) -> Run:
    """Open a run that ships with the package.

    Raises:
        ValueError: there is no such run; the message lists their names.

    Example:
        >>> run = load_example()
        >>> run.epochs
        [1, 2, 4, 8, 14, 20]
        >>> run.attention("layer1.0", epoch=20).shape
        (500, 64)
    """
    names = sorted(manifest.parent.name for manifest in _HERE.glob("*/run.json"))
    if name not in names:
        raise ValueError(f"no example '{name}'; expected one of {', '.join(names)}")
    return open_run(_HERE / name)
