// The CPU kernels. isa.h includes this file once for each instruction set, inside a namespace of its own, with LANES, the
// floats that a vector register of that set holds. Hence no include guard.

#include "vectors.h"

// region look
// For `m` points: where their corners' rows lie, in numbers from the first row (corner by corner, so that the compiler takes
// many points at a time), and what share of each row they read.
template <typename A>
struct Look {
    int m;
    std::vector<int> h, w, first;            // of each point's level
    std::vector<int64_t> head, row;          // of each point's head; of each corner
    std::vector<A> share, x, y;
    explicit Look(int m) : m(m), h(m), w(m), first(m), head(m), row(4 * m), share(4 * m), x(m), y(m) {}
    void operator()(const A* points, const A* weights, uint32_t stride, int64_t outside) {
        const int n = m, *hs = h.data(), *ws = w.data(), *firsts = first.data();
        const int64_t* heads = head.data();
        int64_t* rows = row.data();
        A *shares = share.data(), *xs = x.data(), *ys = y.data();
        #pragma GCC ivdep
        for (int j = 0; j < n; j++) {
            const Axis<A> x = axis(points[2 * j], ws[j]), y = axis(points[2 * j + 1], hs[j]);
            const Corners<A> c = corners(x, y, hs[j], ws[j], firsts[j]);
            for (int i = 0; i < 4; i++) {
                rows[i * n + j] = c.pixel[i] == OUTSIDE ? outside : int64_t(uint64_t(uint32_t(c.pixel[i])) * stride) + heads[j];
                shares[i * n + j] = c.share[i] * weights[j];
            }
            xs[j] = x.share; ys[j] = y.share;
        }
    }
};
// endregion look

// region read
// out = the sum of share * row over the 4 corners of `lk` points, NV vectors of W channels at a time.
template <int NV, int W, typename T, typename A>
void read_block(const T* value, const int64_t* row, const A* share, int lk, int m, T* out) {
    V<A, W> sum[2][NV];                      // two sums in turn: an addition waits for the one before it
    for (int v = 0; v < NV; v++) sum[0][v] = sum[1][v] = V<A, W>{};
    for (int i = 0; i < 4; i += 2, row += 2 * m, share += 2 * m)
        for (int j = 0; j < lk; j++) {
            const T *one = value + row[j], *two = value + row[j + m];
            for (int v = 0; v < NV; v++) {
                sum[0][v] += share[j] * load<W>(one + v * W);
                sum[1][v] += share[j + m] * load<W>(two + v * W);
            }
        }
    for (int v = 0; v < NV; v++) store<W>(out + v * W, sum[0][v] + sum[1][v]);
}

// All `d` channels: as many blocks as fit, then half as many at a time, down to one.
template <int W, int NV = 4, typename T, typename A>
void read(const T* value, const int64_t* row, const A* share, int lk, int m, T* out, int d) {
    int c = 0;
    for (; c + NV * W <= d; c += NV * W) read_block<NV, W>(value + c, row, share, lk, m, out + c);
    if (c == d) return;
    if constexpr (NV > 1) read<W, NV / 2>(value + c, row, share, lk, m, out + c, d - c);
    else if constexpr (W > 1) read<W / 2, 1>(value + c, row, share, lk, m, out + c, d - c);
}
// endregion read

// region forward
// The queries `begin` to `end` of all images; query i = b * queries + q.
template <typename T, typename A>
void forward(const Problem& o, const T* value, const A* points, const A* weights, T* out, int64_t begin, int64_t end) {
    constexpr int W = LANES * sizeof(float) / sizeof(A);
    const int lk = o.l * o.k, m = o.n * lk;
    const std::vector<T> zeros(o.d);
    Look<A> look(m);
    for (int j = 0; j < m; j++) {
        const Level& level = o.levels[j % lk / o.k];
        look.h[j] = level.h; look.w[j] = level.w; look.first[j] = level.first; look.head[j] = j / lk * o.stride_n;
    }
    const int64_t* rows = look.row.data();
    const A* shares = look.share.data();
    for (int64_t i = begin; i < end; i++) {
        const T* image = value + i / o.q * o.stride_b;
        look(points + i * m * 2, weights + i * m, o.stride_s, distance(image, zeros.data()));
        for (int n = 0; n < o.n; n++) read<W>(image, rows + n * lk, shares + n * lk, lk, m, out + (i * o.n + n) * o.d, o.d);
    }
}
// endregion forward

// region dots
// Four vectors become the sums of each, [a, b, c, d]: halves are added to halves, all four at the same time.
template <int W, int HALF, typename A, size_t... I>
V<A, W> fold(V<A, W> a, V<A, W> b, std::index_sequence<I...>) {
    return __builtin_shufflevector(a, b, (I / HALF * 2 * HALF + I % HALF)...) +
           __builtin_shufflevector(a, b, (I / HALF * 2 * HALF + I % HALF + HALF)...);
}
template <int W, typename A>
void sum4(V<A, W> a, V<A, W> b, V<A, W> c, V<A, W> d, A* to) {
    if constexpr (W >= 4) {
        constexpr auto all = std::make_index_sequence<W>();
        V<A, W> x = fold<W, W / 4, A>(fold<W, W / 2, A>(a, b, all), fold<W, W / 2, A>(c, d, all), all);
        if constexpr (W == 8) x += __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6);
        if constexpr (W == 16) {
            x += __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
            x += __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
        }
        store<4>(to, load<4>(to) + __builtin_shufflevector(x, x, 0, W / 4, W / 2, W / 4 * 3));
    } else for (int i = 0; i < W; i++) { to[0] += a[i]; to[1] += b[i]; to[2] += c[i]; to[3] += d[i]; }
}
// endregion dots

// region spread
// One query's gradient: its dot products with the rows of each point go to `dots`, its shares to the gradients of the rows.
template <int NV, int W, typename A>
void spread_block(const A* grad, const A* value, A* to_value, const int64_t* row, const int64_t* to_row, const A* share, int lk, int m, A* dots) {
    V<A, W> g[NV];
    for (int v = 0; v < NV; v++) g[v] = load<W>(grad + v * W);
    for (int j = 0; j < lk; j++) {
        V<A, W> dot[4];
        for (int i = 0; i < 4; i++) {
            dot[i] = V<A, W>{};
            const A* from = value + row[i * m + j];
            A* to = to_value + to_row[i * m + j];
            for (int v = 0; v < NV; v++) {
                dot[i] += g[v] * load<W>(from + v * W);
                store<W>(to + v * W, load<W>(to + v * W) + share[i * m + j] * g[v]);
            }
        }
        sum4<W, A>(dot[0], dot[1], dot[2], dot[3], dots + 4 * j);
    }
}
template <int W, int NV = 4, typename A>
void spread(const A* grad, const A* value, A* to_value, const int64_t* row, const int64_t* to_row, const A* share, int lk, int m, A* dots, int d) {
    int c = 0;
    for (; c + NV * W <= d; c += NV * W) spread_block<NV, W>(grad + c, value + c, to_value + c, row, to_row, share, lk, m, dots);
    if (c == d) return;
    if constexpr (NV > 1) spread<W, NV / 2>(grad + c, value + c, to_value + c, row, to_row, share, lk, m, dots, d - c);
    else if constexpr (W > 1) spread<W / 2, 1>(grad + c, value + c, to_value + c, row, to_row, share, lk, m, dots, d - c);
}
// endregion spread

// region maps
// The rows of one head's values and of their gradients, for some levels of one image. Where rows are read often they are
// copied side by side; the last row then stands for all that is outside. Else they stay where they are.
template <typename T, typename A>
struct Maps {
    const A* value; A* grad;
    int64_t stride, outside, grad_outside;   // numbers from row to row; from the first row to what is outside
    Maps(const Problem& o, const T* map, T* to_map, int64_t s, bool copied, std::vector<A>& room) {
        const int d = o.d;
        if (copied) {
            const int64_t size = ((s + 1) * d + 15) / 16 * 16;      // whole cache lines
            room.assign(2 * size + 64 / sizeof(A), 0);
            A* from = room.data() + (64 - (uintptr_t)room.data() % 64) / sizeof(A);
            for (int64_t i = 0; i < s; i++) for (int c = 0; c < d; c++) from[i * d + c] = A(map[i * o.stride_s + c]);
            value = from; grad = from + size; stride = d; outside = grad_outside = s * d;
        } else if constexpr (std::is_same<T, A>::value) {
            room.assign(2 * d, 0);                                  // a row that reads zeros, a row that is lost
            for (int64_t i = 0; i < s; i++) std::fill_n(to_map + i * o.n * d, d, T(0));
            value = map; grad = to_map; stride = o.stride_s;
            outside = distance(map, (const T*)room.data()); grad_outside = distance((const T*)to_map, (const T*)room.data() + d);
        }
    }
    void put_back(const Problem& o, T* to_map, int64_t s) const {
        for (int64_t i = 0; i < s; i++) for (int c = 0; c < o.d; c++) to_map[i * o.n * o.d + c] = T(grad[i * o.d + c]);
    }
};
// endregion maps

// region backward
// A unit of work is one image, head and level. No other unit adds to its rows, so each sum has one order, always the same.
// Units of the same image and head are done together, for they share the gradient of the output.
template <typename T, typename A>
void backward(const Problem& o, const T* grad, const T* value, const A* points, const A* weights,
              T* to_value, A* to_points, A* to_weights, int64_t begin, int64_t end) {
    constexpr int W = LANES * sizeof(float) / sizeof(A);
    const int d = o.d;
    const int64_t step = int64_t(o.n) * o.l * o.k;                  // points from query to query
    std::vector<A> room, g(d);
    for (int64_t unit = begin, next; unit < end; unit = next) {
        const int64_t b = unit / o.l / o.n, n = unit / o.l % o.n, l0 = unit % o.l;
        next = std::min(end, unit - l0 + o.l);
        const int64_t lk = (next - unit) * o.k, first = o.levels[l0].first, s = o.levels[l0 + next - unit].first - first;
        const T* map = value + b * o.stride_b + first * o.stride_s + n * o.stride_n;
        T* to_map = to_value + ((b * o.s + first) * o.n + n) * d;
        const bool copied = !std::is_same<T, A>::value || o.stride_s != int64_t(o.n) * d || 4 * o.q * lk > 8 * s;   // 8: measured
        const Maps<T, A> maps(o, map, to_map, s, copied, room);

        const int block = std::max<int64_t>(1, 64 / std::max<int64_t>(lk, 1)), m = block * lk;   // queries and points at a time
        Look<A> look(m);
        std::vector<A> xy(2 * m), weight(m), dots(4 * m);
        std::vector<int64_t> grad_row(copied ? 0 : 4 * m);
        for (int j = 0; j < m; j++) {
            const Level& level = o.levels[l0 + j % lk / o.k];
            look.h[j] = level.h; look.w[j] = level.w; look.first[j] = level.first - first;
        }
        for (int64_t q0 = 0; q0 < o.q; q0 += block) {
            const int queries = std::min<int64_t>(block, o.q - q0);
            const int64_t at = (((b * o.q + q0) * o.n + n) * o.l + l0) * o.k;
            for (int i = 0; i < queries; i++) {
                const A *p = points + 2 * (at + i * step), *w = weights + at + i * step;
                prefetch(p + 2 * block * step, 2 * lk); prefetch(w + block * step, lk);
                std::copy_n(p, 2 * lk, xy.data() + 2 * i * lk); std::copy_n(w, lk, weight.data() + i * lk);
            }
            look(xy.data(), weight.data(), maps.stride, maps.outside);
            if (!copied) for (int j = 0; j < 4 * m; j++) grad_row[j] = look.row[j] == maps.outside ? maps.grad_outside : look.row[j];
            const int64_t* grad_rows = copied ? look.row.data() : grad_row.data();
            std::fill(dots.begin(), dots.end(), A(0));
            for (int i = 0; i < queries; i++) {
                const T* from = grad + ((b * o.q + q0 + i) * o.n + n) * d;
                prefetch(from + 4 * int64_t(o.n) * d, d);
                for (int c = 0; c < d; c++) g[c] = A(from[c]);
                spread<W>(g.data(), maps.value, maps.grad, look.row.data() + i * lk, grad_rows + i * lk, look.share.data() + i * lk,
                          lk, m, dots.data() + 4 * i * lk, d);
            }
            for (int i = 0; i < queries; i++) {
                A *p = to_points + 2 * (at + i * step), *w = to_weights + at + i * step;
                #pragma GCC ivdep
                for (int j = 0; j < lk; j++) {
                    const int e = i * lk + j;
                    const A* dot = &dots[4 * e];
                    const Slopes<A> t = slopes(look.x[e], look.y[e], weight[e], look.h[e], look.w[e], dot[0], dot[1], dot[2], dot[3]);
                    p[2 * j] = t.x; p[2 * j + 1] = t.y; w[j] = t.weight;
                }
            }
        }
        if (copied) maps.put_back(o, to_map, s);
    }
}
// endregion backward
