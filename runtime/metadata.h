// Reads what a compiled library says about itself, before any of it is loaded.
//
// File layout (tvm_vitq/library_format.py writes it):
//   [ELF shared object][JSON][u64 ELF bytes | u64 JSON bytes | u32 CRC-32 of both | u32 version | "VITQLIB\0"]
#ifndef VITQ_METADATA_H_
#define VITQ_METADATA_H_

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/extra/json.h>
#include <tvm/ffi/string.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace vitq {

// A user's mistake: its message is all that is printed.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Metadata {
  std::string model;
  bool vta = false;                   // whether the library launches programs of VTA
  std::string target;                 // short name of the target, such as "aarch64-dotprod"
  std::vector<std::string> features;  // CPU flags that the code needs, as Linux spells them
  std::vector<int64_t> input_shape;   // N, 3, H, W; float32
  int64_t elf_machine = 0;
  int64_t classes = 0;

  int64_t InputElements() const {
    int64_t count = 1;
    for (int64_t extent : input_shape) count *= extent;
    return count;
  }
};

constexpr uint32_t kFormatVersion = 1;
constexpr char kMagic[8] = {'V', 'I', 'T', 'Q', 'L', 'I', 'B', '\0'};

struct Trailer {
  uint64_t elf_bytes, json_bytes;
  uint32_t checksum, version;
  char magic[8];
};
static_assert(sizeof(Trailer) == 32, "the trailer is read as it lies in the file, little endian");

// CRC-32 (polynomial 0x04C11DB7, reflected: 0xEDB88320), as zlib's. Eight bytes per step ("slicing by 8"), so that
// checking a library costs less than reading it.
class Crc32 {
 public:
  Crc32() {
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t value = i;
      for (int bit = 0; bit < 8; ++bit) value = (value >> 1) ^ (value & 1 ? 0xEDB88320u : 0u);
      table_[0][i] = value;
    }
    for (int slice = 1; slice < 8; ++slice)
      for (uint32_t i = 0; i < 256; ++i)
        table_[slice][i] = (table_[slice - 1][i] >> 8) ^ table_[0][table_[slice - 1][i] & 255];
  }

  void Update(const unsigned char* data, size_t count) {
    for (; count >= 8; data += 8, count -= 8) {
      uint32_t low, high;
      std::memcpy(&low, data, 4);
      std::memcpy(&high, data + 4, 4);
      low ^= state_;
      state_ = table_[7][low & 255] ^ table_[6][low >> 8 & 255] ^ table_[5][low >> 16 & 255] ^
               table_[4][low >> 24] ^ table_[3][high & 255] ^ table_[2][high >> 8 & 255] ^
               table_[1][high >> 16 & 255] ^ table_[0][high >> 24];
    }
    for (; count > 0; ++data, --count) state_ = (state_ >> 8) ^ table_[0][(state_ ^ *data) & 255];
  }

  uint32_t Value() const { return ~state_; }

 private:
  std::array<std::array<uint32_t, 256>, 8> table_;
  uint32_t state_ = 0xFFFFFFFFu;
};

inline Metadata ParseMetadata(const std::string& path, const std::string& text) {
  namespace json = tvm::ffi::json;
  tvm::ffi::String problem;
  json::Value value = json::Parse(tvm::ffi::String(text), &problem);
  if (!problem.empty()) throw Error(path + ": metadata is not valid JSON: " + std::string(problem));
  auto object = value.cast<json::Object>();
  auto target = object[tvm::ffi::String("target")].cast<json::Object>();
  Metadata data;
  data.model = object[tvm::ffi::String("model")].cast<std::string>();
  data.target = target[tvm::ffi::String("key")].cast<std::string>();
  data.vta = object.count(tvm::ffi::String("program_bytes")) != 0 &&
             object[tvm::ffi::String("program_bytes")].cast<int64_t>() > 0;
  data.elf_machine = object[tvm::ffi::String("elf_machine")].cast<int64_t>();
  data.classes = object[tvm::ffi::String("classes")].cast<int64_t>();
  for (const auto& extent : object[tvm::ffi::String("input_shape")].cast<json::Array>())
    data.input_shape.push_back(extent.cast<int64_t>());
  for (const auto& flag : target[tvm::ffi::String("features")].cast<json::Array>())
    data.features.push_back(flag.cast<std::string>());
  return data;
}

// Throws Error if the file cannot be read, is no library, is damaged, or is of another format version.
inline Metadata ReadMetadata(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) throw Error(path + ": cannot open the library");
  const uint64_t size = static_cast<uint64_t>(file.tellg());
  Trailer trailer{};
  if (size > sizeof(trailer)) {
    file.seekg(size - sizeof(trailer));
    file.read(reinterpret_cast<char*>(&trailer), sizeof(trailer));
  }
  if (!file || std::memcmp(trailer.magic, kMagic, sizeof(kMagic)) != 0)
    throw Error(path + ": not a library written by tvm-vitq's export_library, or a truncated or stripped copy");
  if (trailer.version != kFormatVersion)
    throw Error(path + ": library format " + std::to_string(trailer.version) + ", this program reads format " +
                std::to_string(kFormatVersion) + "; export the library again");
  if (trailer.elf_bytes + trailer.json_bytes + sizeof(trailer) != size)
    throw Error(path + ": damaged library, its length is wrong; copy it again");

  file.seekg(0);
  Crc32 checksum;
  std::vector<char> block(1 << 20);
  for (uint64_t left = trailer.elf_bytes; left > 0 && file;) {
    file.read(block.data(), std::min<uint64_t>(left, block.size()));
    checksum.Update(reinterpret_cast<unsigned char*>(block.data()), file.gcount());
    left -= file.gcount();
  }
  std::string text(trailer.json_bytes, '\0');
  file.read(&text[0], text.size());
  checksum.Update(reinterpret_cast<unsigned char*>(&text[0]), text.size());
  if (!file || checksum.Value() != trailer.checksum)
    throw Error(path + ": damaged library, its checksum is wrong; copy it again");
  return ParseMetadata(path, text);
}

}  // namespace vitq

#endif  // VITQ_METADATA_H_
