// Linked into wheels (EFFATTN_PORTABLE=1), so that they load where glibc is 2.28 and libstdc++ is GCC 8's.
//
// The headers of GCC 12 call a few functions that younger runtimes export. Everything else is in the older
// ones, and libstdc++ stays the shared one: with a static copy, exceptions that torch catches would leave its
// count of uncaught exceptions wrong. Names are assembler names, since the headers declare the originals with
// default visibility, and these must not be seen outside of the library.
#include <new>
#include <sstream>

#define HIDDEN __attribute__((visibility("hidden")))

// GLIBCXX_3.4.26 and 3.4.29: of templates, so they can be instantiated here.
template std::basic_stringstream<char>::basic_stringstream();
template std::basic_ostringstream<char>::basic_ostringstream();
template std::string std::basic_stringbuf<char>::str() const&;
template std::string std::basic_stringbuf<char>::str() &&;

extern "C" {

// GLIBC_2.32. Zero: there may be other threads, so reference counts are atomic.
HIDDEN extern char effattn_single_threaded __asm__("__libc_single_threaded");
char effattn_single_threaded = 0;

// GLIBCXX_3.4.29
HIDDEN void effattn_throw_bad_array_new_length() __asm__("_ZSt28__throw_bad_array_new_lengthv");
void effattn_throw_bad_array_new_length() { throw std::bad_array_new_length(); }

// CXXABI_1.3.13, exception_ptr::_M_addref and _M_release: by the copy constructor and the destructor, which
// have been exported from the first. A copy that is never destroyed is a reference more.
void copy_exception_ptr(void* to, const void* from) __asm__("_ZNSt15__exception_ptr13exception_ptrC1ERKS0_");
void destroy_exception_ptr(void* of) __asm__("_ZNSt15__exception_ptr13exception_ptrD1Ev");

HIDDEN void effattn_exception_add_ref(void* of) __asm__("_ZNSt15__exception_ptr13exception_ptr9_M_addrefEv");
void effattn_exception_add_ref(void* of) {
  void* never_destroyed;
  copy_exception_ptr(&never_destroyed, of);
}

HIDDEN void effattn_exception_release(void* of) __asm__(
    "_ZNSt15__exception_ptr13exception_ptr10_M_releaseEv");
void effattn_exception_release(void* of) { destroy_exception_ptr(of); }

}  // extern "C"
