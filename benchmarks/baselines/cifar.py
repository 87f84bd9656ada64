"""CIFAR-10 by torchvision, with the transforms of the usual CIFAR-10 repositories."""

from torchvision import datasets, transforms

NORMALIZE = transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
TRAIN = transforms.Compose(
    [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor(), NORMALIZE]
)
VAL = transforms.Compose([transforms.ToTensor(), NORMALIZE])


def cifar10(root: str) -> tuple[datasets.CIFAR10, datasets.CIFAR10]:
    return datasets.CIFAR10(root, train=True, transform=TRAIN), datasets.CIFAR10(root, train=False, transform=VAL)
