"""Images, labels and sample ids from a data URI; the same URI, split and seed give the same samples in the same order.

`load_images` opens a data set as an `ImageSet`; a `Loader` turns that into normalised batches.
"""

from stripe.data.decoding import DECODED_AT_ONCE, IMAGE_FORMATS, MEMORY_LIMIT, Encoded, Images, Reader, Resized
from stripe.data.images import LARGEST_NATURAL_SIZE, LARGEST_SIZE, MEASURED_IMAGES, ImageSet, load_images
from stripe.data.loading import PADDING, Loader
from stripe.data.normalisation import CIFAR_MEAN, CIFAR_STD
from stripe.data.sources import FOLDER_SPLITS

__all__ = [
    "CIFAR_MEAN", "CIFAR_STD", "DECODED_AT_ONCE", "FOLDER_SPLITS", "IMAGE_FORMATS", "LARGEST_NATURAL_SIZE",
    "LARGEST_SIZE", "MEASURED_IMAGES", "MEMORY_LIMIT", "PADDING", "Encoded", "ImageSet", "Images",
    "Loader", "Reader", "Resized", "load_images",
]  # fmt: skip
