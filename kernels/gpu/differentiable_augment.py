"""`differentiable_augment` and its adjoint in Triton: each program writes BLOCK pixels of one image, all channels.

Interpolation and the change of colours are linear. So the kernels interpolate first, then change the colours of one
value per pixel and channel, and multiply the mean of the image with the weight of the pixels inside the image.

The adjoint gathers. Let M be the matrix of the map f from output to input pixels, p an input pixel, and c the output
coordinates with f(c) = p. An output pixel q reads p if |f(q) - p| < 1 in both directions. Then q = c + M^-1 e with
|e_x|, |e_y| < 1, so |q_x - c_x| < h_x, the sum of the absolute values of the first row of M^-1, and likewise for y. An
interval of length 2 h holds at most floor(2 h) + 1 pixels. The kernel tries all of them with the weight of the forward
pass, which is 0 for those that do not read p. If h is infinite or the interval is longer than the image, it tries all
pixels of the image. A pixel that rounding excludes lies at the edge, where its weight is as small as the rounding
error. A draw of DSA for square images needs at most 3 x 3: a zoom by 1.2 has h = 1.2, and a rotation by 15 degrees has
h = cos 15 + sin 15 = 1.22.
"""

# Pyright reads a launch, kernel[grid](...), as a call of the function itself, which has no num_warps. It also
# believes that some functions of Triton never return.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tadperf.kernels.gpu import on_device
from tadperf.kernels.gpu.launch_configs import launch_config

# Values of an image up to which every program computes the mean of its image itself, from the cache. For larger images
# another kernel computes the means first. Not tuned.
MEAN_IN_EACH_PROGRAM = 4096
# A part of a draw starts anywhere in the memory of the draw, so its alignment must not select another kernel.
UNALIGNED = ("affine_ptr", "color_ptr", "hole_ptr")


@triton.jit
def pixel_map(affine_ptr, image, height, width):
    """Returns the map from output to input pixels, both relative to the centre: matrix a b / c d, and shift x y."""
    at = affine_ptr + image * 6
    a, b, x = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    c, d, y = tl.load(at + 3), tl.load(at + 4), tl.load(at + 5)
    return a, b * width / height, c * height / width, d, x * width * 0.5, y * height * 0.5


@triton.jit
def source(affine_ptr, image, row, column, height, width):
    """Returns the input coordinates of output pixels, and whether they lie less than a pixel outside of the image."""
    a, b, c, d, shift_x, shift_y = pixel_map(affine_ptr, image, height, width)
    middle_y, middle_x = (height - 1) * 0.5, (width - 1) * 0.5
    y, x = row - middle_y, column - middle_x
    source_y = c * x + d * y + shift_y + middle_y
    source_x = a * x + b * y + shift_x + middle_x
    near = (source_y > -1) & (source_y < height) & (source_x > -1) & (source_x < width)  # false for NaN
    return source_y, source_x, near


@triton.jit
def corner(source_y, source_x, near, height, width, PART: tl.constexpr):
    """Returns row, column and weight of one of the four input pixels around a source, and whether it exists."""
    top, left = tl.floor(source_y), tl.floor(source_x)
    below, right = source_y - top, source_x - left
    weight_y = below if PART // 2 else 1 - below
    weight_x = right if PART % 2 else 1 - right
    row = tl.where(near, top, 0).to(tl.int32) + PART // 2
    column = tl.where(near, left, 0).to(tl.int32) + PART % 2
    exists = near & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return row, column, tl.where(exists, weight_y * weight_x, 0.0), exists


@triton.jit
def hidden(hole_ptr, image, row, column, side):
    """Returns whether pixels lie in the hole. Comparisons with NaN are false: no hole."""
    y = row - tl.load(hole_ptr + image * 2) + side // 2
    x = column - tl.load(hole_ptr + image * 2 + 1) + side // 2
    return (y >= 0) & (y < side) & (x >= 0) & (x < side)


@triton.jit
def sum_of_image(
    first_ptr,
    affine_ptr,
    hole_ptr,
    image,
    channels,
    height,
    width,
    pixel_step,
    channel_step,
    side,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    ADJOINT: tl.constexpr,
):
    """Returns the sum of an image, or the sum of the gradient that reaches its input pixels."""
    channel = tl.arange(0, CHANNELS)[:, None]
    total = tl.zeros([CHANNELS, BLOCK], tl.float32)
    for start in range(0, height * width, BLOCK):
        pixel = start + tl.arange(0, BLOCK)[None, :]
        row, column = pixel // width, pixel % width
        used = (pixel < height * width) & (channel < channels)
        if ADJOINT and hole_ptr is not None:
            used = used & (hidden(hole_ptr, image, row, column, side) == 0)
        at = first_ptr + pixel * pixel_step + channel * channel_step
        value = tl.load(at, used, other=0).to(tl.float32)
        if ADJOINT and affine_ptr is not None:
            source_y, source_x, near = source(affine_ptr, image, row, column, height, width)
            weight = tl.zeros([1, BLOCK], tl.float32)
            for part in tl.static_range(4):
                _, _, share, _ = corner(source_y, source_x, near, height, width, part)
                weight += share
            value *= weight
        total += value
    return tl.sum(total)


@triton.jit
def image_mean(
    first_ptr, affine_ptr, color_ptr, hole_ptr, means_ptr, image, channels, height, width, pixel_step, channel_step,
    side, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, ADJOINT: tl.constexpr,
):  # fmt: skip
    """Returns the mean of an image, or of the gradient that reaches its input pixels. 0 if the contrast is 1."""
    mean = tl.full((), 0.0, tl.float32)
    if means_ptr is not None:
        mean = tl.load(means_ptr + image)
    elif tl.load(color_ptr + image * 3 + 2) != 1:  # a contrast of 1 needs no mean
        mean = sum_of_image(
            first_ptr,
            affine_ptr,
            hole_ptr,
            image,
            channels,
            height,
            width,
            pixel_step,
            channel_step,
            side,
            CHANNELS,
            BLOCK,
            ADJOINT,
        ) / (channels * height * width)
    return mean


@triton.jit
def recolour(value, weight, brightness, saturation, contrast, mean, channels, CHANNELS: tl.constexpr):
    """Changes the colours of interpolated values [CHANNELS, BLOCK]. weight: the sum of the weights of each pixel."""
    value += brightness * weight
    if CHANNELS > 1:
        present = tl.arange(0, CHANNELS)[:, None] < channels
        grey = tl.sum(tl.where(present, value, 0.0), 0, keep_dims=True) / channels
        value = grey + (value - grey) * saturation
    middle = (mean + brightness) * weight
    return middle + (value - middle) * contrast


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def means_kernel(
    x_ptr, means_ptr, affine_ptr, color_ptr, hole_ptr, channels, height, width, pixel_step, channel_step, side,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, ADJOINT: tl.constexpr,
):  # fmt: skip
    """Writes the mean of one image."""
    image = tl.program_id(0).to(tl.int64)
    mean = image_mean(
        x_ptr + image * (channels * height * width), affine_ptr, color_ptr, hole_ptr, None, image, channels, height,
        width, pixel_step, channel_step, side, CHANNELS, BLOCK, ADJOINT,
    )  # fmt: skip
    tl.store(means_ptr + image, mean)


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def augment_kernel(
    x_ptr, y_ptr, affine_ptr, color_ptr, hole_ptr, means_ptr, channels, height, width, pixel_step, channel_step, side,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes BLOCK pixels of an augmented image. A pointer that is None leaves its part out."""
    blocks = tl.cdiv(height * width, BLOCK)
    image = tl.program_id(0).to(tl.int64) // blocks
    pixel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    row, column = pixel // width, pixel % width
    channel = tl.arange(0, CHANNELS)[:, None]
    exists = (pixel < height * width) & (channel < channels)
    first = x_ptr + image * (channels * height * width)
    weight = tl.full([1, BLOCK], 1.0, tl.float32)
    if affine_ptr is None:
        value = tl.load(first + pixel * pixel_step + channel * channel_step, exists, other=0).to(tl.float32)
    else:
        source_y, source_x, near = source(affine_ptr, image, row, column, height, width)
        value = tl.zeros([CHANNELS, BLOCK], tl.float32)
        weight = tl.zeros([1, BLOCK], tl.float32)
        for part in tl.static_range(4):
            r, c, share, inside = corner(source_y, source_x, near, height, width, part)
            at = first + (r * width + c) * pixel_step + channel * channel_step
            value += share * tl.load(at, exists & inside, other=0).to(tl.float32)
            weight += share
    if color_ptr is not None:
        mean = image_mean(
            first, affine_ptr, color_ptr, hole_ptr, means_ptr, image, channels, height, width, pixel_step, channel_step,
            side, CHANNELS, BLOCK, False,
        )  # fmt: skip
        at = color_ptr + image * 3
        brightness, saturation, contrast = tl.load(at), tl.load(at + 1), tl.load(at + 2)
        value = recolour(value, weight, brightness, saturation, contrast, mean, channels, CHANNELS)
        if affine_ptr is not None:
            value = tl.where(near, value, 0.0)  # 0 also if the mean is not finite
    if hole_ptr is not None:
        value = tl.where(hidden(hole_ptr, image, row, column, side), 0.0, value)
    to = y_ptr + image * (channels * height * width) + pixel * pixel_step + channel * channel_step
    tl.store(to, value.to(y_ptr.dtype.element_ty), exists)


@triton.jit
def window(centre, half, size):
    """Returns the first pixel and the number of those less than `half` from the centre; all pixels if there are more.

    size: the number of pixels in this direction.
    """
    count = tl.floor(2 * half) + 1
    known = count < size  # false for infinity and NaN
    count = tl.where(known, count, size)
    first = tl.minimum(tl.maximum(tl.ceil(centre - half), -count), size)
    return tl.where(known, first, 0).to(tl.int32), count.to(tl.int32)


@triton.jit
def windows(affine_ptr, image, row, column, height, width):
    """Returns first row, number of rows, first column and number of columns of the output pixels that read pixels."""
    a, b, c, d, shift_x, shift_y = pixel_map(affine_ptr, image, height, width)
    scale = 1 / (a * d - b * c)
    y, x = row - (height - 1) * 0.5 - shift_y, column - (width - 1) * 0.5 - shift_x
    centre_y = (a * y - c * x) * scale + (height - 1) * 0.5
    centre_x = (d * x - b * y) * scale + (width - 1) * 0.5
    # Eight times the rounding error of a centre, relative to h: the error of the determinant times the largest source.
    condition = (tl.abs(a * d) + tl.abs(b * c)) * tl.abs(scale)
    reach = tl.maximum(height, width) * (1 + tl.abs(a) + tl.abs(b) + tl.abs(c) + tl.abs(d))
    margin = 1 + 1e-6 * condition * (reach + tl.abs(shift_x) + tl.abs(shift_y))
    half_y = (tl.abs(a) + tl.abs(c)) * tl.abs(scale) * margin
    half_x = (tl.abs(d) + tl.abs(b)) * tl.abs(scale) * margin
    first_row, n_rows = window(centre_y, half_y, height)
    first_column, n_columns = window(centre_x, half_x, width)
    return first_row, n_rows, first_column, n_columns


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def adjoint_kernel(
    grad_ptr, grad_x_ptr, affine_ptr, color_ptr, hole_ptr, means_ptr, channels, height, width, pixel_step,
    channel_step, side, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of BLOCK input pixels of an image. A pointer that is None leaves its part out."""
    blocks = tl.cdiv(height * width, BLOCK)
    image = tl.program_id(0).to(tl.int64) // blocks
    pixel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    row, column = pixel // width, pixel % width
    channel = tl.arange(0, CHANNELS)[:, None]
    exists = (pixel < height * width) & (channel < channels)
    first = grad_ptr + image * (channels * height * width)
    if affine_ptr is None:
        used = exists
        if hole_ptr is not None:
            used = exists & (hidden(hole_ptr, image, row, column, side) == 0)
        value = tl.load(first + pixel * pixel_step + channel * channel_step, used, other=0).to(tl.float32)
    else:
        value = tl.zeros([CHANNELS, BLOCK], tl.float32)
        first_row, n_rows, first_column, n_columns = windows(affine_ptr, image, row, column, height, width)
        for down in range(n_rows):
            for across in range(0, n_columns, 3):
                for part in tl.static_range(3):
                    r, c = first_row + down, first_column + across + part
                    y, x, _ = source(affine_ptr, image, r, c, height, width)
                    away_y, away_x = tl.abs(y - row), tl.abs(x - column)
                    reads = (away_y < 1) & (away_x < 1) & (r >= 0) & (r < height) & (c >= 0) & (c < width)
                    if hole_ptr is not None:
                        reads = reads & (hidden(hole_ptr, image, r, c, side) == 0)
                    share = tl.where(reads, (1 - away_y) * (1 - away_x), 0.0)
                    at = first + (r * width + c) * pixel_step + channel * channel_step
                    value += share * tl.load(at, exists & reads, other=0).to(tl.float32)
    if color_ptr is not None:
        mean = image_mean(
            first, affine_ptr, color_ptr, hole_ptr, means_ptr, image, channels, height, width, pixel_step, channel_step,
            side, CHANNELS, BLOCK, True,
        )  # fmt: skip
        at = color_ptr + image * 3
        value = recolour(value, 1.0, 0.0, tl.load(at + 1), tl.load(at + 2), mean, channels, CHANNELS)
    to = grad_x_ptr + image * (channels * height * width) + pixel * pixel_step + channel * channel_step
    tl.store(to, value.to(grad_x_ptr.dtype.element_ty), exists)


def differentiable_augment(
    x: Tensor, affine: Tensor | None, color: Tensor | None, hole: Tensor | None, hole_side: int
) -> Tensor:
    """Returns the augmented images. x [N, C, H, W] is contiguous or channels_last, the others contiguous float32."""
    return _launch(augment_kernel, x, affine, color, hole, hole_side, False)


def differentiable_augment_adjoint(
    grad: Tensor, affine: Tensor | None, color: Tensor | None, hole: Tensor | None, hole_side: int
) -> Tensor:
    """Returns the gradient of the images. Arguments as for `differentiable_augment`."""
    return _launch(adjoint_kernel, grad, affine, color, hole, hole_side, True)


def _launch(
    kernel: triton.JITFunction,
    x: Tensor,
    affine: Tensor | None,
    color: Tensor | None,
    hole: Tensor | None,
    side: int,
    adjoint: bool,
) -> Tensor:
    images, channels, height, width = x.shape
    result = torch.empty_like(x)
    if images == 0:
        return result
    steps = (1, height * width) if x.is_contiguous() else (channels, 1)
    sizes = channels, height, width, *steps, side
    config = launch_config("differentiable_augment", x.device, channels * height * width)
    lanes = triton.next_power_of_2(channels)
    block = max(1, min(config["tile"] // lanes, triton.next_power_of_2(height * width)))
    constants = {"CHANNELS": lanes, "BLOCK": block, "num_warps": config["num_warps"]}
    with on_device(x):
        means = None
        if color is not None and channels * height * width > MEAN_IN_EACH_PROGRAM:
            means = torch.empty(images, dtype=torch.float32, device=x.device)
            means_kernel[(images,)](x, means, affine, color, hole, *sizes, ADJOINT=adjoint, **constants)
        kernel[(images * triton.cdiv(height * width, block),)](
            x, result, affine, color, hole, means, *sizes, **constants
        )
    return result
