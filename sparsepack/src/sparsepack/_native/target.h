// Instruction sets are turned on for one file at a time, so that the compiler's flags stay those of the oldest machine.
// A file between BEGIN and END must not use the standard library: a template instantiated there could be the copy that
// the linker keeps for everyone.
#pragma once

#define SPARSELLM_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define SPARSELLM_TARGET_BEGIN(features) \
  SPARSELLM_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define SPARSELLM_TARGET_END _Pragma("clang attribute pop")
#else
#define SPARSELLM_TARGET_BEGIN(features) _Pragma("GCC push_options") SPARSELLM_PRAGMA(GCC target(features))
#define SPARSELLM_TARGET_END _Pragma("GCC pop_options")
#endif
