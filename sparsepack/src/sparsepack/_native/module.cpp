// The Python module: addresses and sizes in, nothing of torch. Its callers have checked what they pass.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <exception>

#include "driver.h"
#include "pool.h"
#include "round.h"
#include "tiles.h"

namespace {

using namespace sparsellm;

// Best first.
const InstructionSet* const kSets[] = {
#ifdef SPARSELLM_TILES
    &kAvx512Amx, &kAvx512Bf16,
#endif
#ifdef SPARSELLM_X86
    &kAvx512Vbmi2, &kAvx512, &kAvx2,
#endif
#ifdef SPARSELLM_DOTPROD
    &kNeonDotprod,
#endif
#ifdef SPARSELLM_NEON
    &kNeon,
#endif
    &kScalar,
};
constexpr int kCount = sizeof(kSets) / sizeof(kSets[0]);

bool read_numbers(PyObject* const* args, Py_ssize_t given, Py_ssize_t wanted, int64_t* out) {
  if (given != wanted) {
    PyErr_Format(PyExc_TypeError, "%zd integers expected, not %zd", wanted, given);
    return false;
  }
  for (Py_ssize_t i = 0; i < wanted; ++i) {
    out[i] = PyLong_AsLongLong(args[i]);
    if (out[i] == -1 && PyErr_Occurred()) return false;
  }
  return true;
}

constexpr int kSetAndWeight = 1 + kWeightNumbers;

bool read_weight(const int64_t* n, const InstructionSet** set, Packed* weight) {
  *weight = weight_of(n + 1);
  const int64_t stride = weight->stride;
  if (n[0] < 0 || n[0] >= kCount || n[1] < 0 || n[1] >= kValueTypes || stride % 8 != 0 || stride * 8 < weight->columns) {
    PyErr_SetString(PyExc_ValueError, "no such instruction set or value type, or the mask's rows are too short");
    return false;
  }
  const bool grouped = weight->type == kInt4 || (weight->type == kInt8 && weight->group != 0);
  if ((grouped && (weight->group <= 0 || weight->group % kShared != 0)) || (!grouped && weight->group != 0) ||
      (weight->mask_step != 0 && weight->mask_step != stride)) {
    PyErr_SetString(PyExc_ValueError, "groups of 32, 64, ... columns and a mask a row or one for all expected");
    return false;
  }
  *set = kSets[n[0]];
  return true;
}

bool is_float(int64_t kind) { return kind == kBf16 || kind == kFp16 || kind == kFp32; }

template <class Compute>
PyObject* without_gil(const Compute& compute) {
  bool failed = false;
  Py_BEGIN_ALLOW_THREADS;
  try {
    compute();
  } catch (const std::exception&) {  // only memory can run out
    failed = true;
  }
  Py_END_ALLOW_THREADS;
  if (failed) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

PyObject* py_multiply(PyObject*, PyObject* const* args, Py_ssize_t count) {
  int64_t n[kSetAndWeight + 6];
  const InstructionSet* set;
  Packed weight;
  if (!read_numbers(args, count, kSetAndWeight + 6, n) || !read_weight(n, &set, &weight)) return nullptr;
  const int64_t* rest = n + kSetAndWeight;  // tokens, type of x and y, x, y, threads, whether x is rounded to int8
  const bool rounded = rest[5] != 0;
  if (rest[0] < 1 || rest[0] > kMaxTokens || !is_float(rest[1]) || (rounded && is_float(weight.type))) {
    PyErr_SetString(PyExc_ValueError, "1 to 16 tokens of bf16, fp16 or fp32 expected, rounded for integers alone");
    return nullptr;
  }
  return without_gil([&] {
    (rounded ? multiply_rounded : multiply)(*set, weight, static_cast<int>(rest[0]), static_cast<ValueType>(rest[1]),
             at_address<const void>(rest[2]), at_address<void>(rest[3]), static_cast<int>(rest[4]));
  });
}

// The tokens from which tiles are faster for a type of weight, 0 where there are none: set, type.
PyObject* py_least_tokens(PyObject*, PyObject* const* args, Py_ssize_t count) {
  int64_t n[2];
  if (!read_numbers(args, count, 2, n)) return nullptr;
  if (n[0] < 0 || n[0] >= kCount || n[1] < 0 || n[1] >= kValueTypes) {
    PyErr_SetString(PyExc_ValueError, "no such instruction set or value type");
    return nullptr;
  }
  const Tiles* tiles = kSets[n[0]]->tiles;
  const bool known = tiles != nullptr && tiles->decode[n[1]] != nullptr;
  return PyLong_FromLong(known ? tiles->least_tokens : 0);
}

PyObject* py_multiply_tiles(PyObject*, PyObject* const* args, Py_ssize_t count) {
  int64_t n[kSetAndWeight + 4];
  const InstructionSet* set;
  Packed weight;
  if (!read_numbers(args, count, kSetAndWeight + 4, n) || !read_weight(n, &set, &weight)) return nullptr;
  const int64_t* rest = n + kSetAndWeight;  // tokens, x, y, threads
  if (rest[0] < 1 || set->tiles == nullptr || set->tiles->decode[weight.type] == nullptr) {
    PyErr_SetString(PyExc_ValueError, "no tokens, or no tiles for this type of weight");
    return nullptr;
  }
  return without_gil([&] {
    multiply_tiles(*set, weight, rest[0], at_address<const uint16_t>(rest[1]), at_address<uint16_t>(rest[2]),
                   static_cast<int>(rest[3]));
  });
}

PyObject* py_unpack_rows(PyObject*, PyObject* const* args, Py_ssize_t count) {
  int64_t n[kSetAndWeight + 5];
  const InstructionSet* set;
  Packed weight;
  if (!read_numbers(args, count, kSetAndWeight + 5, n) || !read_weight(n, &set, &weight)) return nullptr;
  const int64_t* rest = n + kSetAndWeight;  // first, last, type of out, out, threads
  if (rest[0] < 0 || rest[1] < rest[0] || rest[1] > weight.out || !is_float(rest[2])) {
    PyErr_SetString(PyExc_ValueError, "rows outside the weight, or a type that is no float");
    return nullptr;
  }
  return without_gil([&] {
    unpack_rows(*set, weight, rest[0], rest[1], static_cast<ValueType>(rest[2]), at_address<void>(rest[3]),
                static_cast<int>(rest[4]));
  });
}

// set, plan, steps, tokens, threads
PyObject* py_decode(PyObject*, PyObject* const* args, Py_ssize_t count) {
  int64_t n[5];
  if (!read_numbers(args, count, 5, n)) return nullptr;
  if (n[0] < 0 || n[0] >= kCount || n[3] < 1 || n[3] > kMaxTokens) {
    PyErr_SetString(PyExc_ValueError, "no such instruction set, or not 1 to 16 tokens");
    return nullptr;
  }
  return without_gil([&] {
    decode(*kSets[n[0]], at_address<const int64_t>(n[1]), at_address<const int64_t>(n[2]), static_cast<int>(n[3]),
           static_cast<int>(n[4]));
  });
}

// inputs, out, state, columns, scales, free, inner, moves, gains, table, lowest, highest, zero, first, type, threads
PyObject* py_round_panel(PyObject*, PyObject* const* args, Py_ssize_t count) {
  int64_t n[16];
  if (!read_numbers(args, count, 16, n)) return nullptr;
  if (n[0] < 0 || n[0] > kMaxInputs || n[1] < 0 || n[10] >= n[11] || !is_float(n[14])) {
    PyErr_SetString(PyExc_ValueError, "too many inputs, no numbers, or a type that is not a float");
    return nullptr;
  }
  const auto at = [&](int i) { return at_address<float>(n[i]); };
  const RoundPanel panel{n[0],  n[1],  at(2), at(3), at(4), at(5), at(6), at(7), at(8), at(9), static_cast<float>(n[10]),
                         static_cast<float>(n[11]), n[12] != 0, n[13] != 0, static_cast<ValueType>(n[14])};
  return without_gil([&] { round_panel(panel, static_cast<int>(n[15])); });
}

// (name, supported by this machine) of every instruction set built in, best first.
PyObject* py_instruction_sets(PyObject*, PyObject*) {
  PyObject* list = PyList_New(0);
  for (int i = 0; list != nullptr && i < kCount; ++i) {
    PyObject* item = Py_BuildValue("(sO)", kSets[i]->name, kSets[i]->supported() ? Py_True : Py_False);
    if (item == nullptr || PyList_Append(list, item) != 0) Py_CLEAR(list);
    Py_XDECREF(item);
  }
  return list;
}

// Changes whenever Python passes other numbers or types of weights; sparsepack.native has the same.
constexpr long kInterface = 8;

PyObject* py_interface(PyObject*, PyObject*) { return PyLong_FromLong(kInterface); }

PyObject* py_use_openmp(PyObject*, PyObject* address) {
  const long long number = PyLong_AsLongLong(address);
  if (number == -1 && PyErr_Occurred()) return nullptr;
  use_openmp(reinterpret_cast<GompParallel>(static_cast<uintptr_t>(number)));
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"multiply", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(py_multiply)), METH_FASTCALL, nullptr},
    {"multiply_tiles", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(py_multiply_tiles)), METH_FASTCALL,
     nullptr},
    {"least_tokens", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(py_least_tokens)), METH_FASTCALL,
     nullptr},
    {"unpack_rows", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(py_unpack_rows)), METH_FASTCALL,
     nullptr},
    {"decode", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(py_decode)), METH_FASTCALL, nullptr},
    {"round_panel", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(py_round_panel)), METH_FASTCALL, nullptr},
    {"instruction_sets", py_instruction_sets, METH_NOARGS, nullptr},
    {"interface", py_interface, METH_NOARGS, nullptr},
    {"use_openmp", py_use_openmp, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "_kernels",
                          "Kernels on packed sparse weights; see sparsepack.native.",
                          0,
                          methods,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__kernels(void) { return PyModuleDef_Init(&definition); }
