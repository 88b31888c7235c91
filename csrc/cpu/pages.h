// Memory that the system has promised but not yet given: a large fresh tensor.
#pragma once

#include <cstddef>

namespace vcr1::cpu {

// Whether nothing has been written yet to the page that holds *p. False where that is not known.
bool untouched(const void* p);

// Has the pages of [p, p + bytes) made now, all in one call, instead of at the first write to each.
// What they hold is kept. Where the system cannot, nothing happens.
void populate(void* p, size_t bytes);

}  // namespace vcr1::cpu
