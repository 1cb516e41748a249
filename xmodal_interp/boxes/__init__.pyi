from .coco import mask, mask_box, read_coco, rle, write_coco
from .number_formats import FORMATS, iou, pixel_boxes, read, write
from .text_formats import TEXT_FORMATS, read_text, write_text

__all__ = [
    "FORMATS",
    "TEXT_FORMATS",
    "iou",
    "mask",
    "mask_box",
    "pixel_boxes",
    "read",
    "read_coco",
    "read_text",
    "rle",
    "write",
    "write_coco",
    "write_text",
]
