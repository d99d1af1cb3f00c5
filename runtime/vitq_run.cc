// Runs a library compiled by tvm-vitq on images from a file. An example of deployment without Python, and the
// program that the tests run on an emulated AArch64.
//
//   vitq_run model.so images.bin [--threads n] [--repeat n] [--output logits.bin]
//   vitq_run model.so --info
//
// images.bin holds float32 images, normalized, laid out (N, 3, H, W), N being any multiple of the library's batch.
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <numeric>
#include <string>
#include <vector>

#include "cpu_features.h"
#include "metadata.h"

namespace tvm {
namespace runtime {
namespace threading {
// Exported by libtvm_runtime; the wheel does not ship the header that declares them.
void SetMaxConcurrency(int count);
int MaxConcurrency();
}  // namespace threading
}  // namespace runtime
}  // namespace tvm

namespace {

namespace ffi = tvm::ffi;
using vitq::Error;

struct Options {
  std::string library, input, output;
  int threads = 0;  // 0: TVM's choice
  int repeat = 1;
  bool info = false;
};

constexpr char kUsage[] =
    "usage: vitq_run model.so images.bin [--threads n] [--repeat n] [--output logits.bin]\n"
    "       vitq_run model.so --info\n";

// TVM's vector loads assume that tensors begin on a multiple of 64 bytes.
struct AlignedAllocator {
  void AllocData(DLTensor* tensor) {
    tensor->data = std::aligned_alloc(64, (ffi::GetDataSize(*tensor) + 63) / 64 * 64);
    if (tensor->data == nullptr) throw Error("out of memory for the input");
  }
  void FreeData(DLTensor* tensor) { std::free(tensor->data); }
};

int ParseCount(const std::string& option, const std::string& text) {
  size_t used = 0;
  int value = 0;
  try {
    value = std::stoi(text, &used);
  } catch (const std::exception&) {
  }
  if (used != text.size() || value < 1) throw Error(option + " wants a whole number of 1 or more, got '" + text + "'");
  return value;
}

Options ParseOptions(int argc, char** argv) {
  Options options;
  std::vector<std::string> files;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word == "--info") {
      options.info = true;
    } else if (word == "--threads" || word == "--repeat" || word == "--output") {
      if (++i == argc) throw Error(word + " wants a value");
      if (word == "--output") options.output = argv[i];
      if (word == "--threads") options.threads = ParseCount(word, argv[i]);
      if (word == "--repeat") options.repeat = ParseCount(word, argv[i]);
    } else if (word.size() > 1 && word[0] == '-') {
      throw Error("unknown option " + word + "\n" + kUsage);
    } else {
      files.push_back(word);
    }
  }
  if (files.size() != (options.info ? 1 : 2)) throw Error(std::string("wrong number of files\n") + kUsage);
  options.library = files[0];
  if (!options.info) options.input = files[1];
  return options;
}

std::string ShapeText(const std::vector<int64_t>& shape) {
  std::string text;
  for (int64_t extent : shape) text += (text.empty() ? "" : "x") + std::to_string(extent);
  return text;
}

void CheckRunsHere(const std::string& path, const vitq::Metadata& meta) {
  if (meta.elf_machine != vitq::kElfMachine)
    throw Error(path + ": compiled for " + meta.target + ", another architecture than this machine's");
  if (meta.vta) throw Error(path + ": compiled for VTA, which only tvm_vitq.load_library in Python drives");
  const std::string missing = vitq::MissingFlags(meta.features);
  if (!missing.empty())
    throw Error(path + ": compiled for " + meta.target + ", this CPU lacks: " + missing +
                "; compile for this CPU or an older one");
}

std::vector<float> ReadImages(const std::string& path, const vitq::Metadata& meta) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) throw Error(path + ": cannot open the images");
  const int64_t bytes = file.tellg(), batch_bytes = meta.InputElements() * 4;
  if (bytes == 0 || bytes % batch_bytes != 0)
    throw Error(path + ": has " + std::to_string(bytes) + " bytes, expected a multiple of " +
                std::to_string(batch_bytes) + " (float32 " + ShapeText(meta.input_shape) + ")");
  std::vector<float> images(bytes / 4);
  file.seekg(0);
  file.read(reinterpret_cast<char*>(images.data()), bytes);
  if (!file) throw Error(path + ": cannot read the images");
  if (!std::all_of(images.begin(), images.end(), [](float value) { return std::isfinite(value); }))
    throw Error(path + ": images have NaN or infinity");
  return images;
}

// Written beside its place and renamed, so that nobody reads half a file.
void WriteWhole(const std::string& path, const std::vector<float>& values) {
  const std::string part = path + ".part";
  std::ofstream file(part, std::ios::binary);
  file.write(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float));
  file.close();
  if (!file || std::rename(part.c_str(), path.c_str()) != 0) {
    std::remove(part.c_str());
    throw Error(path + ": cannot write the logits");
  }
}

void PrintTop(int64_t image, const float* logits, int64_t classes) {
  std::vector<int64_t> order(classes);
  std::iota(order.begin(), order.end(), 0);
  const int64_t count = std::min<int64_t>(5, classes);
  std::partial_sort(order.begin(), order.begin() + count, order.end(),
                    [logits](int64_t a, int64_t b) { return logits[a] > logits[b]; });
  std::printf("image %lld:", static_cast<long long>(image));
  for (int64_t i = 0; i < count; ++i)
    std::printf("  class %lld (%g)", static_cast<long long>(order[i]), logits[order[i]]);
  std::printf("\n");
}

void Run(const Options& options) {
  const vitq::Metadata meta = vitq::ReadMetadata(options.library);
  std::printf("%s for %s, input %s, %lld classes\n", meta.model.c_str(), meta.target.c_str(),
              ShapeText(meta.input_shape).c_str(), static_cast<long long>(meta.classes));
  if (options.info) return;
  CheckRunsHere(options.library, meta);
  const std::vector<float> images = ReadImages(options.input, meta);
  // TVM asks the system for the number of CPUs in front of every parallel loop unless it has been told.
  namespace threading = tvm::runtime::threading;
  threading::SetMaxConcurrency(options.threads > 0 ? options.threads : threading::MaxConcurrency());

  // A name without a slash would be looked up in the system's library folders.
  const std::string file = options.library.find('/') == std::string::npos ? "./" + options.library : options.library;
  ffi::Module vm = ffi::Module::LoadFromFile(file)->GetFunction("vm_load_executable").value()().cast<ffi::Module>();
  constexpr int kPooledAllocator = 2;
  vm->GetFunction("vm_initialization").value()(static_cast<int>(kDLCPU), 0, kPooledAllocator);
  ffi::Function run = vm->GetFunction("main").value();
  // Weights that are unpacked once; `main` takes them behind its input.
  std::vector<ffi::Any> arguments(1);
  if (auto load = vm->GetFunction("vitq_load"))
    for (const ffi::Any& weight : (*load)().cast<ffi::Array<ffi::Any>>()) arguments.push_back(weight);

  ffi::Tensor input = ffi::Tensor::FromNDAlloc(AlignedAllocator(), ffi::Shape(meta.input_shape),
                                               DLDataType{kDLFloat, 32, 1}, DLDevice{kDLCPU, 0});
  arguments[0] = input;
  const std::vector<ffi::AnyView> views(arguments.begin(), arguments.end());
  const int64_t in_count = meta.InputElements(), out_count = meta.input_shape[0] * meta.classes;
  std::vector<float> logits;
  std::vector<double> milliseconds;
  for (size_t at = 0; at < images.size(); at += in_count) {
    std::copy_n(images.begin() + at, in_count, static_cast<float*>(input.data_ptr()));
    ffi::Tensor output;
    for (int i = 0; i < options.repeat; ++i) {
      const auto start = std::chrono::steady_clock::now();
      ffi::Any result;
      run.CallPacked(ffi::PackedArgs(views.data(), static_cast<int32_t>(views.size())), &result);
      output = result.cast<ffi::Tensor>();
      const std::chrono::duration<double, std::milli> spent = std::chrono::steady_clock::now() - start;
      milliseconds.push_back(spent.count());
    }
    if (output.numel() != out_count) throw Error(options.library + ": the library's output does not fit its metadata");
    const float* values = static_cast<const float*>(output.data_ptr());
    logits.insert(logits.end(), values, values + out_count);
  }

  if (!options.output.empty()) WriteWhole(options.output, logits);
  constexpr int64_t kPrinted = 10;
  const int64_t count = static_cast<int64_t>(logits.size()) / meta.classes;
  for (int64_t i = 0; i < std::min(count, kPrinted); ++i) PrintTop(i, logits.data() + i * meta.classes, meta.classes);
  if (count > kPrinted) std::printf("... and %lld more images\n", static_cast<long long>(count - kPrinted));
  std::nth_element(milliseconds.begin(), milliseconds.begin() + milliseconds.size() / 2, milliseconds.end());
  std::printf("median of %zu runs: %.3f ms per batch of %lld\n", milliseconds.size(),
              milliseconds[milliseconds.size() / 2], static_cast<long long>(meta.input_shape[0]));
}

}  // namespace

int main(int argc, char** argv) {
  setenv("TVM_BIND_THREADS", "0", 0);  // or TVM moves this thread to core 0, whatever taskset says
  setenv("TVM_THREAD_POOL_SPIN_COUNT", "2000", 0);  // or the program ends late where others use its cores
  try {
    Run(ParseOptions(argc, argv));
  } catch (const Error& error) {
    std::fprintf(stderr, "vitq_run: %s\n", error.what());
    return 1;
  } catch (const std::exception& error) {  // TVM's own errors, with its backtrace
    std::fprintf(stderr, "vitq_run: the runtime failed: %s\n", error.what());
    return 1;
  }
  return 0;
}
