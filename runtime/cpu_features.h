// Which of the CPU flags that a library needs are missing here. Flags are spelled as in /proc/cpuinfo.
#ifndef VITQ_CPU_FEATURES_H_
#define VITQ_CPU_FEATURES_H_

#include <cstdint>
#include <fstream>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#if defined(__aarch64__)
#include <sys/auxv.h>
#elif !defined(__x86_64__)
#error "compiled libraries exist for x86-64 and AArch64 only"
#endif

namespace vitq {

#if defined(__aarch64__)

constexpr int64_t kElfMachine = 183;  // EM_AARCH64

// getauxval rather than /proc/cpuinfo: sandboxes may hide the file, and emulators answer it for the CPU they emulate.
// Bits as in Linux's arch/arm64/include/uapi/asm/hwcap.h, an interface that does not change.
inline std::set<std::string> CpuFlags() {
  struct Flag {
    const char* name;
    int word, bit;  // AT_HWCAP or AT_HWCAP2, and the bit within
  };
  constexpr Flag kFlags[] = {
      {"fp", 1, 0},       {"asimd", 1, 1},  {"crc32", 1, 7},     {"atomics", 1, 8},  {"asimdhp", 1, 10},
      {"asimdrdm", 1, 12}, {"jscvt", 1, 13}, {"fcma", 1, 14},     {"lrcpc", 1, 15},   {"asimddp", 1, 20},
      {"sve", 1, 22},     {"asimdfhm", 1, 23}, {"flagm", 1, 27},  {"sve2", 2, 1},     {"flagm2", 2, 7},
      {"frint", 2, 8},    {"i8mm", 2, 13},  {"bf16", 2, 14},      {"cssc", 2, 34},    {"mops", 2, 43},
  };
  const uint64_t words[3] = {0, getauxval(AT_HWCAP), getauxval(AT_HWCAP2)};
  std::set<std::string> flags;
  for (const Flag& flag : kFlags)
    if (words[flag.word] >> flag.bit & 1) flags.insert(flag.name);
  return flags;
}

#else

constexpr int64_t kElfMachine = 62;  // EM_X86_64

inline std::set<std::string> CpuFlags() {
  std::ifstream cpuinfo("/proc/cpuinfo");
  for (std::string line; std::getline(cpuinfo, line);) {
    if (line.compare(0, 5, "flags") != 0) continue;
    std::istringstream words(line.substr(line.find(':') + 1));
    std::set<std::string> flags;
    for (std::string word; words >> word;) flags.insert(word);
    return flags;
  }
  return {};
}

#endif

// The needed flags that this CPU lacks, separated by spaces; empty if the code can run.
inline std::string MissingFlags(const std::vector<std::string>& needed) {
  const std::set<std::string> here = CpuFlags();
  std::string missing;
  for (const std::string& flag : needed)
    if (here.count(flag) == 0) missing += (missing.empty() ? "" : " ") + flag;
  return missing;
}

}  // namespace vitq

#endif  // VITQ_CPU_FEATURES_H_
