"""Image files as arrays: which files are images, decoding, cropping, normalising.

Nothing here depends on a framework: both implementations get the same NumPy arrays, bit by bit.
"""

import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image
from tqdm import tqdm
from .errors import InputError

MEAN = np.array((0.485, 0.456, 0.406), np.float32)  # of ImageNet, RGB, pixels in 0..1
STD = np.array((0.229, 0.224, 0.225), np.float32)
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")  # of images, in any case
JUNK = {  # what systems and NAS boxes leave in folders and archives, in small letters
    *("__macosx", "thumbs.db", "desktop.ini", "$recycle.bin", "system volume information"),
    *("@eadir", "lost+found"),
}

TURNS = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Of damaged EXIF and of many pixels; what cannot be read is an InputError.
warnings.filterwarnings("ignore", module="PIL")


def is_junk(name):
    """Whether a file or folder of this name is hidden or left by a system: no image, no class."""
    return name.startswith(".") or name.lower() in JUNK


def listed(folder):
    """Paths in a folder, by name, without junk; none where there is no such folder."""
    try:
        return sorted(path for path in folder.iterdir() if not is_junk(path.name))
    except (FileNotFoundError, NotADirectoryError):
        return []


def images_in(folder):
    """Paths of the images that lie in a folder itself, by name."""
    # A link that leads nowhere counts: decoding then names it.
    suited = (path for path in listed(folder) if path.suffix.lower() in SUFFIXES)
    return [path for path in suited if not path.is_dir()]


def images_below(folder, above=()):
    """Paths of the images in a folder and in the folders below it, by name."""
    here = folder.resolve()
    if here in above:  # a link to a folder around it
        return []
    folders = [path for path in listed(folder) if path.is_dir()]
    below = [image for path in folders for image in images_below(path, (*above, here))]
    return images_in(folder) + below


def size(image):
    """How messages give the size of an image (H, W, 3)."""
    return f"{image.shape[1]}x{image.shape[0]}"


def to_rgb(image):
    """A Pillow image of any mode -> (H, W, 3) uint8."""
    if image.mode.startswith("I"):
        # 16-bit greyscale, which convert() would clip to white: its high byte, as Pillow reads
        # 16-bit colour.
        grey = (np.clip(np.asarray(image), 0, 0xFFFF) >> 8).astype(np.uint8)  # (H, W)
        return np.stack([grey] * 3, axis=2)
    if "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours, without Pillow's warning
    return np.asarray(image.convert("RGB"))


def turned(image):
    """A Pillow image turned upright, by its EXIF orientation."""
    try:
        turn = TURNS.get(image.getexif().get(0x0112))
    except Exception:  # damaged EXIF, which says nothing of the pixels
        turn = None
    return image if turn is None else image.transpose(turn)


def decode_one(path, upright=False):
    """One image file -> (H, W, 3) uint8, if `upright` turned by its EXIF. Raises InputError."""
    try:
        with Image.open(path) as image:
            return to_rgb(turned(image) if upright else image)
    except MemoryError:
        raise
    except Image.DecompressionBombError:
        raise InputError(f"{path} has more than 178 million pixels; make it smaller") from None
    except Exception as error:
        # Missing, truncated, no image: Pillow raises what its decoders happen to raise.
        content = "truncated" if "truncated" in str(error) else "not an image"
        reason = getattr(error, "strerror", None) or content
        raise InputError(f"{path} cannot be read ({reason}); replace it") from None


def decode_each(paths, progress, upright=False):
    """Yield the images in files, in order, decoded in threads; as decode_one otherwise."""
    pool = ThreadPoolExecutor()  # Pillow decodes outside Python's lock
    try:
        hidden = not progress or not sys.stderr.isatty()
        options = dict(desc="reading images", unit="image", leave=False, disable=hidden)
        images = pool.map(lambda path: decode_one(path, upright), paths)
        yield from tqdm(images, total=len(paths), **options)
    finally:
        pool.shutdown(cancel_futures=True)  # an error or Ctrl-C does not wait for the rest


def decode(paths, progress):
    """Read image files -> (N, H, W, 3) uint8; all must have one size."""
    images = None
    for i, image in enumerate(decode_each(paths, progress)):
        if images is None:
            images = np.empty((len(paths), *image.shape), np.uint8)
        if image.shape != images.shape[1:]:
            raise InputError(
                f"{paths[i]} is {size(image)} pixels, the images before it are "
                f"{size(images[0])}; resize it, or give --img-size"
            )
        images[i] = image
    return images


def count_bytes(paths):
    """About how much memory the decoded images in files take, from the sizes of some of them."""
    some = paths[:: -(-len(paths) // 64)]
    total = 0
    for path in some:
        try:
            with Image.open(path) as image:
                total += 3 * image.width * image.height
        except Exception:
            decode_one(path)  # says what is wrong
            raise
    return total * len(paths) // len(some)


def read_photo(path, height, width, crop_pct):
    """The image in any file as a network sees it, upright, (height, width, 3) uint8.

    Raises InputError.
    """
    return centre_crop(decode_one(path, upright=True), height, width, crop_pct)


def centre_crop(image, height, width, crop_pct):
    """(H, W, 3) uint8 -> (height, width, 3), resized and its centre cut out.

    As timm's and torchvision's evaluation transforms: it is resized (bicubic) until it just covers
    height / crop_pct x width / crop_pct.
    """
    image = Image.fromarray(image)
    least_height, least_width = int(height / crop_pct), int(width / crop_pct)
    # In whole numbers: 3 / 7 * 7 need not be 3.
    if image.width * least_height <= image.height * least_width:
        scaled = least_width, least_width * image.height // image.width
    else:
        scaled = least_height * image.width // image.height, least_height
    left, top = round((scaled[0] - width) / 2), round((scaled[1] - height) / 2)
    if scaled[0] * scaled[1] > Image.MAX_IMAGE_PIXELS:
        # Of so long a strip the centre alone is resized; the edges may round otherwise.
        x, y = image.width / scaled[0], image.height / scaled[1]
        right, bottom = min((left + width) * x, image.width), min((top + height) * y, image.height)
        box = (left * x, top * y, right, bottom)
        return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box=box))
    if scaled != image.size:
        image = image.resize(scaled, Image.Resampling.BICUBIC)
    return np.asarray(image.crop((left, top, left + width, top + height)))


def normalise(images):
    """(n, H, W, 3) uint8 -> (n, 3, H, W) float32, where ImageNet has mean 0 and deviation 1."""
    images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))  # (n, H, W, 3) -> (n, 3, H, W)
    scale = (1 / (255 * STD)).reshape(1, 3, 1, 1)  # (3,) -> (1, 3, 1, 1)
    shift = (MEAN / STD).reshape(1, 3, 1, 1)  # (3,) -> (1, 3, 1, 1)
    return images * scale - shift
