// The streaming primitives for the CPU: see exnorm/ops/native.py, which compiles and calls this file.
//
// Legend: N batch, C channels, L positions. Two layouts: rows, (N, C, L), where a moment covers L neighbours, and
// columns, (N, L, C). Sums run in the coefficients' type over chunks of positions and in double over the chunks; the
// moments of chunks are merged by Chan's formula, so that neither a long row nor a large mean costs digits.
#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t kChunk = 2048;  // positions of one row: stays in the first-level cache for its second pass
constexpr int64_t kLines = 64;    // positions of one block of columns, likewise
constexpr int64_t kBlock = 64;    // channels of one block of columns
constexpr int64_t kLanes = 16;    // neighbours that are summed side by side
constexpr int64_t kSerial = 16384;  // fewer elements than this are not worth waking a second thread

struct BFloat16 {
  uint16_t bits;
};

inline float load(const float* p) { return *p; }
inline double load(const double* p) { return *p; }
inline float load(const BFloat16* p) {
  uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline void store(float* p, float value) { *p = value; }
inline void store(double* p, double value) { *p = value; }
inline void store(BFloat16* p, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  p->bits = value != value ? 0x7fc0 : static_cast<uint16_t>(rounded);
}

template <class T>
struct Coefficient {
  using type = float;
};
template <>
struct Coefficient<double> {
  using type = double;
};

// Activations of u; NaN passes. `derive` is g * act'(u), with torch's values at the corners.
struct None {
  template <class A> static A apply(A u) { return u; }
  template <class A> static A derive(A, A g) { return g; }
};
struct Relu {
  template <class A> static A apply(A u) { return u < 0 ? A(0) : u; }
  template <class A> static A derive(A u, A g) { return u <= 0 ? A(0) : g; }
};
struct Relu6 {
  template <class A> static A apply(A u) { return u < 0 ? A(0) : u > 6 ? A(6) : u; }
  template <class A> static A derive(A u, A g) { return u <= 0 || u >= 6 ? A(0) : g; }
};
struct Hardswish {
  template <class A> static A apply(A u) { return u * Relu6::apply(u + A(3)) / A(6); }
  template <class A> static A derive(A u, A g) { return u < -3 ? A(0) : u <= 3 ? g * (u / A(3) + A(0.5)) : g; }
};

struct Shape {
  int64_t samples, channels, length;
  bool columns;
  int64_t rows() const { return samples * channels; }
  bool parallel() const { return rows() * length > kSerial; }
  int64_t blocks() const { return (channels + kBlock - 1) / kBlock; }
};

template <class A>
struct Affine {
  const A *mean, *scale, *shift;
};

// Calls body(row) for each (sample, channel) of the row layout.
template <class Body>
void each_row(const Shape& s, Body body) {
#pragma omp parallel for schedule(static) if (s.parallel())
  for (int64_t row = 0; row < s.rows(); ++row) body(row);
}

// Calls body(sample, first channel, channels) for each block of the column layout.
template <class Body>
void each_block(const Shape& s, Body body) {
#pragma omp parallel for schedule(static) if (s.parallel())
  for (int64_t i = 0; i < s.samples * s.blocks(); ++i) {
    int64_t first = i % s.blocks() * kBlock;
    body(i / s.blocks(), first, std::min(kBlock, s.channels - first));
  }
}

// Calls body(sample, first element of the line, channels) for each (sample, position) of the column layout.
template <class Body>
void each_line(const Shape& s, Body body) {
#pragma omp parallel for schedule(static) if (s.parallel())
  for (int64_t line = 0; line < s.samples * s.length; ++line) body(line / s.length, line * s.channels, s.channels);
}

// Merges a chunk's count, mean and sum of squared differences into a total's.
inline void merge(double& mean, double& square, double before, double count, double chunk_mean, double chunk_square) {
  double difference = chunk_mean - mean, all = before + count;
  mean += difference * (count / all);
  square += chunk_square + difference * difference * (before * count / all);
}

template <class T, class A, int64_t Fixed>
void moments_rows(const Shape& s, const T* x, A* mean, A* var) {
  const int64_t length = Fixed ? Fixed : s.length;
  each_row(s, [=](int64_t row) {
    double total = 0, square = 0;
    for (int64_t from = 0; from < length; from += kChunk) {
      const T* chunk = x + row * length + from;
      const int64_t count = Fixed ? Fixed : std::min(kChunk, length - from);
      A sum = 0, differences = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t l = 0; l < count; ++l) sum += load(chunk + l);
      const A centre = sum / A(count);
#pragma omp simd reduction(+ : differences, squares)
      for (int64_t l = 0; l < count; ++l) {
        const A difference = load(chunk + l) - centre;
        differences += difference;
        squares += difference * difference;
      }
      const double left = double(differences) / double(count);  // what rounding left out of the centre
      merge(total, square, double(from), double(count), centre + left, squares - left * left * double(count));
    }
    mean[row] = A(total);
    var[row] = A(square / double(length));
  });
}

template <class T, class A>
void moments_columns(const Shape& s, const T* x, A* mean, A* var) {
  each_block(s, [=](int64_t n, int64_t first, int64_t channels) {
    double total[kBlock] = {}, square[kBlock] = {};
    for (int64_t from = 0; from < s.length; from += kLines) {
      const T* chunk = x + (n * s.length + from) * s.channels + first;
      const int64_t count = std::min(kLines, s.length - from);
      A centre[kBlock] = {}, differences[kBlock] = {}, squares[kBlock] = {};
      for (int64_t l = 0; l < count; ++l)
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) centre[c] += load(chunk + l * s.channels + c);
      for (int64_t c = 0; c < channels; ++c) centre[c] /= A(count);
      for (int64_t l = 0; l < count; ++l)
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) {
          const A difference = load(chunk + l * s.channels + c) - centre[c];
          differences[c] += difference;
          squares[c] += difference * difference;
        }
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) {
        const double left = double(differences[c]) / double(count);
        merge(total[c], square[c], double(from), double(count), centre[c] + left, squares[c] - left * left * double(count));
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      mean[n * s.channels + first + c] = A(total[c]);
      var[n * s.channels + first + c] = A(square[c] / double(s.length));
    }
  });
}

template <class Act, class T, class A, int64_t Fixed, bool Residual>
void affine_rows(const Shape& s, const T* r, const T* x, Affine<A> f, T* y) {
  const int64_t length = Fixed ? Fixed : s.length;
  each_row(s, [=](int64_t row) {
    const A mean = f.mean[row], scale = f.scale[row], shift = f.shift[row];
    const T* in = x + row * length;
    T* out = y + row * length;
#pragma omp simd
    for (int64_t l = 0; l < length; ++l) {
      const A u = (load(in + l) - mean) * scale + shift;
      store(out + l, Act::apply(Residual ? u + load(r + row * length + l) : u));
    }
  });
}

template <class Act, class T, class A, bool Residual>
void affine_columns(const Shape& s, const T* r, const T* x, Affine<A> f, T* y) {
  each_line(s, [=](int64_t n, int64_t line, int64_t channels) {
    const A *mean = f.mean + n * channels, *scale = f.scale + n * channels, *shift = f.shift + n * channels;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const A u = (load(x + line + c) - mean[c]) * scale[c] + shift[c];
      store(y + line + c, Act::apply(Residual ? u + load(r + line + c) : u));
    }
  });
}

template <class Act, class T, class A, int64_t Fixed>
void sums_rows(const Shape& s, const T* g, const T* x, Affine<A> f, A* dscale, A* dshift) {
  const int64_t length = Fixed ? Fixed : s.length;
  each_row(s, [=](int64_t row) {
    const A mean = f.mean[row], scale = f.scale[row], shift = f.shift[row];
    double total = 0, product = 0;
    for (int64_t from = 0; from < length; from += kChunk) {
      const int64_t at = row * length + from, count = Fixed ? Fixed : std::min(kChunk, length - from);
      // Lanes by hand: gcc does not vectorize a reduction over a conditional.
      A sum[kLanes] = {}, products[kLanes] = {};
      for (int64_t l = 0; l < count; l += kLanes) {
        const int64_t lanes = Fixed ? std::min(kLanes, Fixed) : std::min(kLanes, count - l);
        auto add = [&](int64_t lane) {
          const A centred = load(x + at + l + lane) - mean;
          const A grad = Act::derive(centred * scale + shift, A(load(g + at + l + lane)));
          sum[lane] += grad;
          products[lane] += grad * centred;
        };
        if (lanes == kLanes) {
#pragma omp simd
          for (int64_t lane = 0; lane < kLanes; ++lane) add(lane);
        } else {
#pragma omp simd
          for (int64_t lane = 0; lane < lanes; ++lane) add(lane);
        }
      }
      for (int64_t lane = 0; lane < std::min(kLanes, count); ++lane) {
        total += sum[lane];
        product += products[lane];
      }
    }
    dshift[row] = A(total);
    dscale[row] = A(product);
  });
}

template <class Act, class T, class A>
void sums_columns(const Shape& s, const T* g, const T* x, Affine<A> f, A* dscale, A* dshift) {
  each_block(s, [=](int64_t n, int64_t first, int64_t channels) {
    const int64_t at = n * s.channels + first;
    const A *mean = f.mean + at, *scale = f.scale + at, *shift = f.shift + at;
    double total[kBlock] = {}, product[kBlock] = {};
    for (int64_t from = 0; from < s.length; from += kLines) {
      A sum[kBlock] = {}, products[kBlock] = {};
      for (int64_t l = from; l < std::min(from + kLines, s.length); ++l) {
        const int64_t line = (n * s.length + l) * s.channels + first;
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) {
          const A centred = load(x + line + c) - mean[c];
          const A grad = Act::derive(centred * scale[c] + shift[c], A(load(g + line + c)));
          sum[c] += grad;
          products[c] += grad * centred;
        }
      }
      for (int64_t c = 0; c < channels; ++c) {
        total[c] += sum[c];
        product[c] += products[c];
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      dshift[at + c] = A(total[c]);
      dscale[at + c] = A(product[c]);
    }
  });
}

template <class Act, class T, class A, int64_t Fixed>
void gradient_rows(const Shape& s, const T* g, const T* x, Affine<A> f, const A* slope, const A* offset, T* dx) {
  const int64_t length = Fixed ? Fixed : s.length;
  each_row(s, [=](int64_t row) {
    const A mean = f.mean[row], scale = f.scale[row], shift = f.shift[row];
    const A p = slope[row], q = offset[row];
    const int64_t at = row * length;
#pragma omp simd
    for (int64_t l = 0; l < length; ++l) {
      const A centred = load(x + at + l) - mean;
      const A grad = Act::derive(centred * scale + shift, A(load(g + at + l)));
      store(dx + at + l, grad * scale + (centred * p + q));
    }
  });
}

template <class Act, class T, class A>
void gradient_columns(const Shape& s, const T* g, const T* x, Affine<A> f, const A* slope, const A* offset, T* dx) {
  each_line(s, [=](int64_t n, int64_t line, int64_t channels) {
    const A *mean = f.mean + n * channels, *scale = f.scale + n * channels, *shift = f.shift + n * channels;
    const A *p = slope + n * channels, *q = offset + n * channels;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const A centred = load(x + line + c) - mean[c];
      const A grad = Act::derive(centred * scale[c] + shift[c], A(load(g + line + c)));
      store(dx + line + c, grad * scale[c] + (centred * p[c] + q[c]));
    }
  });
}

struct Buffers {
  const void *other, *x, *mean, *scale, *shift, *slope, *offset;  // other: the gradient; for kAffine the residual
  void *out, *out2;
};

template <class T, class A>
void moments(const Shape& s, const Buffers& b) {
  const T* x = static_cast<const T*>(b.x);
  A *mean = static_cast<A*>(b.out), *var = static_cast<A*>(b.out2);
  if (s.columns) moments_columns<T, A>(s, x, mean, var);
  else if (s.length == 4) moments_rows<T, A, 4>(s, x, mean, var);
  else if (s.length == 16) moments_rows<T, A, 16>(s, x, mean, var);
  else moments_rows<T, A, 0>(s, x, mean, var);
}

enum Pass { kMoments, kAffine, kSums, kGradient };

template <class Act, class T, class A, int64_t Fixed>
void rows(Pass pass, const Shape& s, const Buffers& b, Affine<A> f) {
  const T *g = static_cast<const T*>(b.other), *x = static_cast<const T*>(b.x);
  const A *slope = static_cast<const A*>(b.slope), *offset = static_cast<const A*>(b.offset);
  if (pass == kAffine && !g) affine_rows<Act, T, A, Fixed, false>(s, g, x, f, static_cast<T*>(b.out));
  if (pass == kAffine && g) affine_rows<Act, T, A, Fixed, true>(s, g, x, f, static_cast<T*>(b.out));
  if (pass == kSums) sums_rows<Act, T, A, Fixed>(s, g, x, f, static_cast<A*>(b.out), static_cast<A*>(b.out2));
  if (pass == kGradient) gradient_rows<Act, T, A, Fixed>(s, g, x, f, slope, offset, static_cast<T*>(b.out));
}

template <class Act, class T, class A>
void columns(Pass pass, const Shape& s, const Buffers& b, Affine<A> f) {
  const T *g = static_cast<const T*>(b.other), *x = static_cast<const T*>(b.x);
  const A *slope = static_cast<const A*>(b.slope), *offset = static_cast<const A*>(b.offset);
  if (pass == kAffine && !g) affine_columns<Act, T, A, false>(s, g, x, f, static_cast<T*>(b.out));
  if (pass == kAffine && g) affine_columns<Act, T, A, true>(s, g, x, f, static_cast<T*>(b.out));
  if (pass == kSums) sums_columns<Act, T, A>(s, g, x, f, static_cast<A*>(b.out), static_cast<A*>(b.out2));
  if (pass == kGradient) gradient_columns<Act, T, A>(s, g, x, f, slope, offset, static_cast<T*>(b.out));
}

template <class Act, class T>
void with_activation(Pass pass, const Shape& s, const Buffers& b) {
  using A = typename Coefficient<T>::type;
  const Affine<A> f{static_cast<const A*>(b.mean), static_cast<const A*>(b.scale), static_cast<const A*>(b.shift)};
  if (s.columns) columns<Act, T, A>(pass, s, b, f);
  else if (s.length == 4) rows<Act, T, A, 4>(pass, s, b, f);
  else if (s.length == 16) rows<Act, T, A, 16>(pass, s, b, f);
  else rows<Act, T, A, 0>(pass, s, b, f);
}

template <class T>
void with_type(Pass pass, int act, const Shape& s, const Buffers& b) {
  if (pass == kMoments) moments<T, typename Coefficient<T>::type>(s, b);
  else if (act == 0) with_activation<None, T>(pass, s, b);
  else if (act == 1) with_activation<Relu, T>(pass, s, b);
  else if (act == 2) with_activation<Relu6, T>(pass, s, b);
  else with_activation<Hardswish, T>(pass, s, b);
}

}  // namespace

// type: 0 float32, 1 float64, 2 bfloat16. act: 0 none, 1 relu, 2 relu6, 3 hardswish. pass: as the enum above.
extern "C" void exnorm_pass(int pass, int type, int act, int columns, int64_t samples, int64_t channels, int64_t length,
                            const void* other, const void* x, const void* mean, const void* scale, const void* shift,
                            const void* slope, const void* offset, void* out, void* out2) {
  // One position a row is one line of columns, which runs over neighbours.
  const Shape s{samples, channels, length, columns != 0 || length == 1};
  const Buffers b{other, x, mean, scale, shift, slope, offset, out, out2};
  if (type == 0) with_type<float>(Pass(pass), act, s, b);
  else if (type == 1) with_type<double>(Pass(pass), act, s, b);
  else with_type<BFloat16>(Pass(pass), act, s, b);
}
