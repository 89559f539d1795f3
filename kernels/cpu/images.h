// What the bindings of operators on images share: tensors by their addresses, sums over the images.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

template <class T> inline T *at(uintptr_t address) { return reinterpret_cast<T *>(address); }

// Sums over the images, one after another: [images, channels] -> [channels].
inline void add_images(const float *shares, int64_t images, int64_t channels, float *out) {
  std::vector<double> sums(channels);
  for (int64_t i = 0; i < images; i++)
    for (int64_t c = 0; c < channels; c++) sums[c] += shares[i * channels + c];
  std::copy(sums.begin(), sums.end(), out);
}
