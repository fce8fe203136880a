// The CPU kernels. isa.h includes this file once for each instruction set, inside a namespace of its own, with LANES, the
// floats that a vector register of that set holds. Hence no include guard.

#include "vectors.h"
#include "exp.h"
#include "dilated.h"

// region dilated_rows
// The rows of a map that are at work, as A: `count` of them, the newest in the place of the oldest. In each row, channel after
// channel, `w` pixels and then zeros, as many as a window reaches beyond the border; what is above and below is a row of zeros.
template <typename A>
struct Rows {
    int64_t h, wide, size, count, newest = -1;
    std::vector<A> room;
    A* zeros;
    Rows() {}
    Rows(const Problem& o, int64_t channels, int64_t far)
        : h(o.h), wide((o.w + std::min<int64_t>(far, o.w - 1) + 15) / 16 * 16), size(channels * wide), count(std::min<int64_t>(2 * far + 1, o.h)),
          room((count + 1) * size + wide + 64 / sizeof(A)) {
        zeros = room.data() + (64 - (uintptr_t)room.data() % 64) / sizeof(A) + wide;  // before the first row there are zeros too
    }
    A* operator()(int64_t y) { return inside(y, h) ? zeros + (y % count + 1) * size : zeros; }
};

template <int W> constexpr int LESS = W > 4 ? 4 : 1;                                  // where W at a time are too many

template <int W, typename T, typename A>
void widen(const T* from, A* to, int64_t w) {
    if constexpr (W > 1) if (w < W) return widen<LESS<W>>(from, to, w);
    for (int64_t x = 0; x < w; x += W) { const int64_t at = std::min(x, w - W); store<W>(to + at, load<W>(from + at)); }
}

// The rows up to `y`, those that are not there yet.
template <int W, typename T, typename A>
void fetch(Rows<A>& rows, const Problem& o, const T* map, int64_t stride, int64_t y) {
    while (rows.newest < std::min<int64_t>(y, o.h - 1)) {
        A* to = rows(++rows.newest);
        for (int c = 0; c < o.d; c++) {
            const T* from = map + c * stride + rows.newest * o.w;
            prefetch(from + o.w, o.w);                                                 // the next row, before it is asked for
            widen<W>(from, to + c * rows.wide, o.w);
        }
    }
}

// Where each key of the windows of row `y` begins, for the row's first pixel.
template <typename A>
void window(Rows<A>& rows, const Problem& o, int dilation, int64_t y, A** key) {
    for (int i = 0; i < o.ks; i++)
        for (int j = 0; j < o.ks; j++) {
            const int64_t x = reach(j, o.ks, dilation);
            *key++ = x > -o.w && x < o.w ? rows(y + reach(i, o.ks, dilation)) + x : rows.zeros;
        }
}
// endregion dilated_rows

// region dilated_dots
// The dot products over the channels of each query with the `count` keys of its window, W queries at a time.
template <int W, int N = 9, typename T, typename A>
void dots(const T* q, int64_t stride, A* const* key, int64_t wide, int64_t x, int d, int count, V<A, W>* to) {
    int j = 0;
    for (; j + N <= count; j += N) {
        V<A, W> sum[N] = {};
        for (int c = 0; c < d; c++) {
            const V<A, W> a = load<W>(q + c * stride);
            for (int i = 0; i < N; i++) sum[i] += a * load<W>(key[j + i] + c * wide + x);
        }
        for (int i = 0; i < N; i++) to[j + i] = sum[i];
    }
    if constexpr (N > 1) if (j < count) dots<W, N / 3>(q, stride, key + j, wide, x, d, count - j, to + j);
}
// endregion dilated_dots

// region dilated_gather
// The sum of share * row over the `count` rows of the window, W pixels and N channels at a time.
template <int W, int N = 8, typename T, typename A>
void gather(const V<A, W>* share, A* const* row, int64_t wide, int64_t x, int d, int count, T* to, int64_t stride) {
    int c = 0;
    for (; c + N <= d; c += N) {
        V<A, W> sum[N] = {};
        for (int j = 0; j < count; j++) {
            const A* from = row[j] + c * wide + x;
            for (int i = 0; i < N; i++) sum[i] += share[j] * load<W>(from + i * wide);
        }
        for (int i = 0; i < N; i++) store<W>(to + (c + i) * stride, sum[i]);
    }
    if constexpr (N > 1) if (c < d) gather<W, LESS<N>>(share, row, wide, c * wide + x, d - c, count, to + c * stride, stride);
}
// endregion dilated_gather

// region dilated_attend
// Keys outside have the logit zero by themselves, for their rows are zeros. Any other `padding` is written in their place.
template <int W, typename A>
void pad(const Problem& o, int dilation, int64_t y, int64_t x0, V<A, W>* logit) {
    using I = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
    V<I, W> lane;
    for (int i = 0; i < W; i++) lane[i] = i;
    const V<A, W> padding = V<A, W>{} + A(o.padding);
    for (int i = 0; i < o.ks; i++)
        for (int j = 0; j < o.ks; j++, logit++) {
            const int64_t x = x0 + reach(j, o.ks, dilation);
            if (!inside(y + reach(i, o.ks, dilation), o.h) || x <= -W || x >= o.w) *logit = padding;
            else *logit = (lane + I(x) >= 0) & (lane + I(x) < I(o.w)) ? *logit : padding;
        }
}

// The softmax of the windows of W queries, from column x on.
template <int W, typename T, typename A>
void weigh(const Problem& o, const T* q, A* const* key, int64_t wide, int dilation, int64_t y, int64_t x, V<A, W>* share) {
    const int count = o.ks * o.ks;
    dots<W>(q + y * o.w + x, o.q.d, key, wide, x, o.d, count, share);
    for (int j = 0; j < count; j++) share[j] *= A(o.scale);
    if (o.padding != 0) pad<W, A>(o, dilation, y, x, share);
    const V<A, W> whole = A(1) / shares(share, count, largest(share, count, share[0]));
    for (int j = 0; j < count; j++) share[j] *= whole;
}
// endregion dilated_attend

// region dilated_forward
template <int W, typename T, typename A>
void forward_row(const Problem& o, const T* q, A* const* key, A* const* value, int64_t wide, int dilation, int64_t y, void* room, T* out) {
    if constexpr (W > 1) if (o.w < W) return forward_row<LESS<W>>(o, q, key, value, wide, dilation, y, room, out);
    V<A, W>* share = (V<A, W>*)room;
    for (int64_t i = 0; i < o.w; i += W) {
        const int64_t x = std::min<int64_t>(i, o.w - W);                               // the last queries twice, rather than fewer at a time
        weigh<W>(o, q, key, wide, dilation, y, x, share);
        gather<W>(share, value, wide, x, o.d, o.ks * o.ks, out + y * o.w + x, int64_t(o.h) * o.w);
    }
}

// A unit of work is a strip of rows of one head and image; units of one head follow each other.
struct Unit {
    int n, dilation;
    int64_t b, far, from, to;
    Unit(const Problem& o, int64_t strips, int64_t i)
        : n(i / strips / o.b), dilation(o.dilation(n)), b(i / strips % o.b), far(reach(o.ks - 1, o.ks, dilation)), from(o.h * (i % strips) / strips),
          to(o.h * (i % strips + 1) / strips) {}
    int64_t at(const Map& m) const { return b * m.b + n * m.n; }
};

// Space for `count` vectors of any width.
struct Room {
    std::vector<char> bytes;
    explicit Room(int64_t count) : bytes(64 * count + 64) {}
    void* operator()() { return bytes.data() + (64 - (uintptr_t)bytes.data() % 64); }
};

template <typename T, typename A>
void forward(const Problem& o, const T* q, const T* k, const T* v, T* out, int64_t strips, int64_t begin, int64_t end) {
    constexpr int W = LANES * sizeof(float) / sizeof(A);
    const int count = o.ks * o.ks;
    std::vector<A*> key(count), value(count);
    Room room(count);
    Rows<A> keys, values;
    for (int64_t i = begin, far = -1; i < end; i++) {
        const Unit u(o, strips, i);
        if (u.far != far) { far = u.far; keys = Rows<A>(o, o.d, far); values = Rows<A>(o, o.d, far); }
        keys.newest = values.newest = std::max<int64_t>(u.from - far, 0) - 1;
        for (int64_t y = u.from; y < u.to; y++) {
            fetch<W>(keys, o, k + u.at(o.k), o.k.d, y + far);
            fetch<W>(values, o, v + u.at(o.v), o.v.d, y + far);
            window(keys, o, u.dilation, y, key.data());
            window(values, o, u.dilation, y, value.data());
            for (int c = 0; c < o.d; c++) prefetch(q + u.at(o.q) + c * o.q.d + (y + 1) * o.w, o.w);
            forward_row<W>(o, q + u.at(o.q), key.data(), value.data(), keys.wide, u.dilation, y, room(), out + (u.b * o.n + u.n) * o.d * o.h * o.w);
        }
    }
}
// endregion dilated_forward

// region dilated_backward
// What a row of queries has to say: its gradient, and for each key its share and the gradient to its logit.
template <int W, typename T, typename A>
void queries_row(const Problem& o, const T* q, const T* grad, A* const* key, A* const* value, int64_t wide, int dilation, int64_t y, void* room,
                 A* to_share, A* to_slope, T* to_q) {
    if constexpr (W > 1) if (o.w < W) return queries_row<LESS<W>>(o, q, grad, key, value, wide, dilation, y, room, to_share, to_slope, to_q);
    const int count = o.ks * o.ks;
    V<A, W> *share = (V<A, W>*)room, *g = share + count;
    for (int64_t i = 0; i < o.w; i += W) {
        const int64_t x = std::min<int64_t>(i, o.w - W);
        weigh<W>(o, q, key, wide, dilation, y, x, share);
        dots<W>(grad + y * o.w + x, o.grad.d, value, wide, x, o.d, count, g);
        V<A, W> mean = {};
        for (int j = 0; j < count; j++) mean += share[j] * g[j];
        for (int j = 0; j < count; j++) {
            g[j] = slope(share[j], g[j], mean) * A(o.scale);
            store<W>(to_share + j * wide + x, share[j]); store<W>(to_slope + j * wide + x, g[j]);
        }
        if (to_q) gather<W>(g, key, wide, x, o.d, count, to_q + y * o.w + x, int64_t(o.h) * o.w);
    }
}

// The gradients of a row of keys and values: key j of a query has that query at the place of its own key count - 1 - j.
template <int W, typename T, typename A>
void keys_row(const Problem& o, A* const* share, A* const* slope, A* const* query, A* const* grad, int64_t wide, int64_t y, void* room,
              T* to_k, T* to_v) {
    if constexpr (W > 1) if (o.w < W) return keys_row<LESS<W>>(o, share, slope, query, grad, wide, y, room, to_k, to_v);
    const int count = o.ks * o.ks;
    V<A, W> *p = (V<A, W>*)room, *s = p + count;
    for (int64_t i = 0; i < o.w; i += W) {
        const int64_t x = std::min<int64_t>(i, o.w - W), plane = int64_t(o.h) * o.w;
        for (int j = 0; j < count; j++) {
            p[j] = load<W>(share[j] + (count - 1 - j) * wide + x);
            s[j] = load<W>(slope[j] + (count - 1 - j) * wide + x);
        }
        gather<W>(s, query, wide, x, o.d, count, to_k + y * o.w + x, plane);
        gather<W>(p, grad, wide, x, o.d, count, to_v + y * o.w + x, plane);
    }
}

// Nobody adds to another's gradients: each key gathers what its queries have to say, once they all have said it.
template <typename T, typename A>
void backward(const Problem& o, const T* grad, const T* q, const T* k, const T* v, T* to_q, T* to_k, T* to_v,
              int64_t strips, int64_t begin, int64_t end) {
    constexpr int W = LANES * sizeof(float) / sizeof(A);
    const int count = o.ks * o.ks;
    std::vector<A*> one(count), two(count), three(count), four(count);
    Room room(2 * count);
    Rows<A> keys, values, queries, grads, all_shares, slopes;
    for (int64_t i = begin, far = -1; i < end; i++) {
        const Unit u(o, strips, i);
        const int64_t out = (u.b * o.n + u.n) * o.d * o.h * o.w, first = std::max<int64_t>(u.from - u.far, 0);
        if (u.far != far) {
            far = u.far;
            for (auto* x : {&keys, &values, &queries, &grads}) *x = Rows<A>(o, o.d, far);
            for (auto* x : {&all_shares, &slopes}) *x = Rows<A>(o, count, far);
        }
        keys.newest = values.newest = std::max<int64_t>(first - far, 0) - 1;
        queries.newest = grads.newest = first - 1;
        for (int64_t y = first; y < u.to + far; y++) {
            if (y < o.h) {
                fetch<W>(keys, o, k + u.at(o.k), o.k.d, y + far);
                fetch<W>(values, o, v + u.at(o.v), o.v.d, y + far);
                fetch<W>(queries, o, q + u.at(o.q), o.q.d, y);
                fetch<W>(grads, o, grad + u.at(o.grad), o.grad.d, y);
                window(keys, o, u.dilation, y, one.data());
                window(values, o, u.dilation, y, two.data());
                queries_row<W>(o, q + u.at(o.q), grad + u.at(o.grad), one.data(), two.data(), keys.wide, u.dilation, y, room(),
                               all_shares(y), slopes(y), y >= u.from && y < u.to ? to_q + out : nullptr);
            }
            if (y - far < u.from) continue;
            window(all_shares, o, u.dilation, y - far, one.data());
            window(slopes, o, u.dilation, y - far, two.data());
            window(queries, o, u.dilation, y - far, three.data());
            window(grads, o, u.dilation, y - far, four.data());
            keys_row<W>(o, one.data(), two.data(), three.data(), four.data(), keys.wide, y - far, room(), to_k + out, to_v + out);
        }
    }
}
// endregion dilated_backward
