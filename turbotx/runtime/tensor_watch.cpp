// Whether any of many tensors was changed or moved: a loop that Python would take fifty times as long for.
//   in:  handles of tensors, what their addresses and versions were, and PyTorch's functions for both
//   out: 1 where one differs
#include <cstdint>

extern "C" {

// Whether any tensor lies elsewhere than at its address, or has another version. `address_of` and
// `version_of` are PyTorch's own functions of a tensor's handle.
int ttx_tensors_changed(int64_t count, void* const* tensors, void* const* addresses,
                        const int64_t* versions, int32_t (*address_of)(void*, void**),
                        int64_t (*version_of)(void*)) {
  for (int64_t i = 0; i < count; ++i) {
    void* address = nullptr;
    if (version_of(tensors[i]) != versions[i]) return 1;
    if (address_of(tensors[i], &address) != 0 || address != addresses[i]) return 1;
  }
  return 0;
}

}  // extern "C"
