// Lets a PyTorch without a GPU hold tensors that say cuda:0: a device guard that does nothing, hooks that report one
// device, and an allocator of "pinned" memory. tests/cuda/stub.py builds and loads this file.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <mutex>
#include <unordered_set>

namespace {

const c10::Device kDevice(c10::DeviceType::CUDA, 0);

// Ordinary memory whose blocks are remembered, so that Tensor.is_pinned() can tell them from other memory.
struct PinnedMemory final : c10::Allocator {
  std::mutex mutex;
  std::unordered_set<const void *> blocks;

  static PinnedMemory &get() {
    static PinnedMemory *memory = new PinnedMemory;  // never destroyed: tensors may outlive static objects
    return *memory;
  }
  static void release(void *data) {
    {
      std::lock_guard<std::mutex> lock(get().mutex);
      get().blocks.erase(data);
    }
    c10::GetCPUAllocator()->raw_deallocate(data);
  }
  c10::DataPtr allocate(size_t bytes) override {
    void *data = c10::GetCPUAllocator()->raw_allocate(bytes);
    std::lock_guard<std::mutex> lock(mutex);
    if (data) blocks.insert(data);
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void *to, const void *from, size_t bytes) const override { default_copy_data(to, from, bytes); }
  bool contains(const void *data) {
    std::lock_guard<std::mutex> lock(mutex);
    return blocks.count(data) > 0;
  }
};

struct Hooks : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex current_device() const override { return 0; }
  bool isPinnedPtr(const void *data) const override { return PinnedMemory::get().contains(data); }
  c10::Allocator *getPinnedMemoryAllocator() const override { return &PinnedMemory::get(); }
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::Stream getDefaultStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};

std::unique_ptr<at::CUDAHooksInterface> make_hooks(at::CUDAHooksArgs args) { return std::make_unique<Hooks>(args); }

// Runs when this library is loaded, before the CUDA build of PyTorch registers its own hooks with a lower priority.
const bool kRegistered = [] {
  at::CUDAHooksRegistry()->Register("CUDAHooks", &make_hooks, c10::REGISTRY_PREFERRED);
  return true;
}();

}  // namespace

// Installs the device guard. The guard that is registered last counts, so call this after PyTorch is loaded.
extern "C" void install_guard() { c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, new Guard); }
