// Shared by the bindings of the operators on images: sums over the images.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

// Adds the images, one after another, in float64: [images, channels] -> [channels].
inline void add_images(const float *shares, int64_t images, int64_t channels, float *out) {
  std::vector<double> sums(channels);
  for (int64_t i = 0; i < images; i++)
    for (int64_t c = 0; c < channels; c++) sums[c] += shares[i * channels + c];
  std::copy(sums.begin(), sums.end(), out);
}
