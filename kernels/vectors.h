// Vectors of numbers, and how they are read from memory and written to it. Included by each kernel file once for each instruction
// set, inside a namespace of its own. Hence no include guard.

// region vectors
// W numbers side by side; + - * act on all of them at once.
template <typename A, int W>
struct Vector { typedef A type __attribute__((vector_size(W * sizeof(A)))); };
template <typename A, int W> using V = typename Vector<A, W>::type;

template <int W> V<float, W> load(const float* p) { V<float, W> v; __builtin_memcpy(&v, p, sizeof v); return v; }
template <int W> V<double, W> load(const double* p) { V<double, W> v; __builtin_memcpy(&v, p, sizeof v); return v; }
template <int W> void store(float* p, V<float, W> v) { __builtin_memcpy(p, &v, sizeof v); }
template <int W> void store(double* p, V<double, W> v) { __builtin_memcpy(p, &v, sizeof v); }

template <int W> V<float, W> load(const BFloat16* p) {     // a bfloat16 is the upper half of a float
    V<uint16_t, W> bits; __builtin_memcpy(&bits, p, sizeof bits);
    return (V<float, W>)(__builtin_convertvector(bits, V<uint32_t, W>) << 16);
}
template <int W> V<float, W> load(const Half* p) {         // 5 bits of exponent become 8
    V<uint16_t, W> bits; __builtin_memcpy(&bits, p, sizeof bits);
    const V<uint32_t, W> h = __builtin_convertvector(bits, V<uint32_t, W>), most = (h & 0x7fff) << 13;
    const V<uint32_t, W> number = (V<uint32_t, W>)((V<float, W>)most * 0x1p112f), special = most | 0x7f800000;   // infinity, NaN
    return (V<float, W>)((most >= 0x0f800000 ? special : number) | (h & 0x8000) << 16);
}
template <int W> void store(BFloat16* p, V<float, W> v) { for (int i = 0; i < W; i++) p[i] = BFloat16(v[i]); }
template <int W> void store(Half* p, V<float, W> v) { for (int i = 0; i < W; i++) p[i] = Half(v[i]); }
// endregion vectors
