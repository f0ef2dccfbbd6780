"""The embedded text-to-video pipeline "shapes": its world, its detector, its training script and its weights."""
