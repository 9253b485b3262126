// CHANGE: your operator. It may use everything that torch has in C++, or read the tensors' memory itself.
#include <torch/extension.h>

torch::Tensor my_add(const torch::Tensor& a, const torch::Tensor& b) {
  return 2 * a + b;
}

PYBIND11_MODULE(my_add_cpp, m) {
  m.def("my_add", &my_add, "2a + b");
}
