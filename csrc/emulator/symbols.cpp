// What the library's own file tells: where its shared memory is and what the variables are called (the symbol table), and
// to which line of source a program counter belongs (its debug information, read by addr2line).
#include <cxxabi.h>
#include <elf.h>
#include <fcntl.h>
#include <link.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "state.h"

namespace minidiff::emulator {
namespace {

// Touched once in every thread, so that the loader makes the thread's copy of all.
thread_local volatile char anchor;

struct Library {
  std::string path;
  uintptr_t base = 0;
  char* thread_storage = nullptr;  // of the calling thread
};

int look_for_this(dl_phdr_info* info, size_t, void* out) {
  uintptr_t here = reinterpret_cast<uintptr_t>(&machine), start = ~uintptr_t(0), end = 0;
  for (int i = 0; i < info->dlpi_phnum; i++) {
    const auto& part = info->dlpi_phdr[i];
    if (part.p_type != PT_LOAD) continue;
    start = std::min(start, uintptr_t(info->dlpi_addr + part.p_vaddr));
    end = std::max(end, uintptr_t(info->dlpi_addr + part.p_vaddr + part.p_memsz));
  }
  if (here < start || here >= end) return 0;
  auto& library = *static_cast<Library*>(out);
  library.base = info->dlpi_addr;
  machine.image_start = reinterpret_cast<const char*>(start);
  machine.image_end = reinterpret_cast<const char*>(end);
  library.thread_storage = static_cast<char*>(info->dlpi_tls_data);
  library.path = *info->dlpi_name ? info->dlpi_name : "/proc/self/exe";
  return 1;
}

Library library;

std::string demangled(const char* name) {
  int status;
  std::unique_ptr<char, decltype(&free)> text(abi::__cxa_demangle(name, nullptr, nullptr, &status), free);
  return status ? name : text.get();
}

// "kernel(float*)::tile" -> "tile": after the last "::" outside brackets
std::string last_part(const std::string& name) {
  int depth = 0;
  for (size_t i = name.size(); i-- > 1;) {
    char c = name[i];
    depth += (c == ')' || c == '>' || c == ']') - (c == '(' || c == '<' || c == '[');
    if (!depth && c == ':' && name[i - 1] == ':') return name.substr(i + 1);
  }
  return name;
}

bool starts_with(const char* s, const char* start) { return !strncmp(s, start, strlen(start)); }

// `static thread_local` in a function of a kernel; a library we are linked with may have its own.
bool is_shared_variable(const char* name) {
  if (!starts_with(name, "_ZZ")) return false;
  for (const char* other : {"_ZZN8pybind11", "_ZZNK8pybind11", "_ZZNSt", "_ZZNKSt", "_ZZSt"})
    if (starts_with(name, other)) return false;
  return true;
}

void read_symbols(const char* file) {
  auto header = reinterpret_cast<const Elf64_Ehdr*>(file);
  auto sections = reinterpret_cast<const Elf64_Shdr*>(file + header->e_shoff);
  for (int i = 0; i < header->e_shnum; i++) {
    if (sections[i].sh_type != SHT_SYMTAB) continue;
    auto symbols = reinterpret_cast<const Elf64_Sym*>(file + sections[i].sh_offset);
    const char* names = file + sections[sections[i].sh_link].sh_offset;
    for (size_t k = 0; k < sections[i].sh_size / sizeof(Elf64_Sym); k++) {
      const char* name = names + symbols[k].st_name;
      if (ELF64_ST_TYPE(symbols[k].st_info) != STT_TLS) continue;
      // g++ guards arrays of classes, although there is nothing to construct
      if (starts_with(name, "_ZGVZ")) machine.guards.push_back(symbols[k].st_value);
      if (!is_shared_variable(name)) continue;
      if (ELF64_ST_BIND(symbols[k].st_info) == STB_GNU_UNIQUE)
        throw std::runtime_error("compile kernels with -fvisibility=hidden: libraries would have " + demangled(name) +
                                 " in common");
      machine.variables.push_back({symbols[k].st_value, symbols[k].st_size, last_part(demangled(name))});
    }
  }
}

void find_variables(const std::string& path) {
  int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  struct stat info;
  if (fd < 0 || fstat(fd, &info)) throw std::runtime_error("the emulator cannot read its own file " + path);
  void* file = mmap(nullptr, size_t(info.st_size), PROT_READ, MAP_PRIVATE, fd, 0);
  close(fd);
  if (file == MAP_FAILED) throw std::runtime_error("the emulator cannot read its own file " + path);
  read_symbols(static_cast<const char*>(file));
  munmap(file, size_t(info.st_size));
  auto& v = machine.variables;
  std::sort(v.begin(), v.end(), [](auto& a, auto& b) { return a.offset < b.offset; });
}

// addr2line prints for each address the address, then a line "file:line" for the place and for each function that it was
// inlined into.
std::string addr2line(const std::vector<uintptr_t>& pcs) {
  std::string command = "addr2line -a -i -e '" + library.path + "'", out;
  for (uintptr_t pc : pcs) {
    char hex[32];
    snprintf(hex, sizeof hex, " 0x%lx", (unsigned long)(pc - library.base));
    command += hex;
  }
  FILE* pipe = popen((command + " 2>/dev/null").c_str(), "r");
  if (!pipe) return out;
  char part[4096];
  while (size_t n = fread(part, 1, sizeof part, pipe)) out.append(part, n);
  pclose(pipe);
  return out;
}

bool is_kernel_file(const std::string& file) { return file.size() > 3 && !file.compare(file.size() - 3, 3, ".cu"); }

// The innermost line, and the innermost in a .cu where that is another.
Place from_lines(const std::vector<std::pair<std::string, int>>& lines, uintptr_t pc) {
  Place place;
  char hex[40];
  snprintf(hex, sizeof hex, "program counter %#lx", (unsigned long)(pc - library.base));
  place.text = hex;
  if (lines.empty()) return place;
  auto kernel = std::find_if(lines.begin(), lines.end(), [](auto& l) { return is_kernel_file(l.first); });
  if (kernel == lines.end()) kernel = lines.begin();
  place.file = kernel->first;
  place.line = kernel->second;
  auto text = [](auto& l) { return l.first + ":" + std::to_string(l.second); };
  place.text = text(lines[0]);
  if (kernel != lines.begin()) place.text += " (from " + text(*kernel) + ")";
  return place;
}

std::vector<Place> parse(const std::string& text, const std::vector<uintptr_t>& pcs) {
  std::vector<std::vector<std::pair<std::string, int>>> lines;
  for (size_t at = 0, end; at < text.size(); at = end + 1) {
    end = std::min(text.find('\n', at), text.size());
    std::string line = text.substr(at, end - at);
    size_t colon = line.rfind(':');
    if (!line.compare(0, 2, "0x") && colon == std::string::npos) lines.emplace_back();
    else if (!lines.empty() && colon != std::string::npos && line[0] != '?' && atoi(&line[colon + 1]))
      lines.back().push_back({base_name(line.substr(0, colon).c_str()), atoi(&line[colon + 1])});
  }
  lines.resize(pcs.size());
  std::vector<Place> places;
  for (size_t i = 0; i < pcs.size(); i++) places.push_back(from_lines(lines[i], pcs[i]));
  return places;
}

}  // namespace

void find_statics() {
  anchor = 1;
  bool first = !library.base;
  dl_iterate_phdr(look_for_this, &library);
  machine.statics = library.thread_storage;
  if (first) find_variables(library.path);
}

std::vector<Place> places_of(const std::vector<uintptr_t>& pcs) {
  if (pcs.empty()) return {};
  return parse(addr2line(pcs), pcs);
}

}  // namespace minidiff::emulator
