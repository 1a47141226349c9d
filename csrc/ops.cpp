// The contract of ops.h: arguments are checked here, for every module, then handed to the kernels in use.
#include "ops.h"

#include <algorithm>
#include <cmath>

#include "kernels.h"

namespace minidiff {
namespace {

int64_t rows_of(const View& v) { return v && !v.shape.empty() ? v.shape[0] : 0; }
int64_t at(const View& v, int i) { return v && i < (int)v.shape.size() ? v.shape[i] : 0; }

struct Side {
  int top, bottom, left, right;
};
Side four(const Check& check, const Sides& s) {
  check.that(s.size() == 2 && s[0].size() == 2 && s[1].size() == 2, "sides", "must be ((top, bottom), (left, right))");
  for (auto& pair : s)
    for (int n : pair) check.that(n >= 0, "sides", "must not be negative");
  return {s[0][0], s[0][1], s[1][0], s[1][1]};
}

// The forward convolution, without its arrays.
Conv geometry(const Check& check, int B, int h, int w, int C1, int C2, const View& weights, int stride, const Sides& sides,
              int upsample) {
  check.that(stride >= 1, "stride", "must be at least 1");
  check.that(upsample >= 1, "upsample", "must be at least 1");
  Side s = four(check, sides);
  check.array(weights, "w", {ANY, ANY, C1 + C2, ANY});
  Conv c;
  c.B = B, c.h = h, c.w = w, c.C1 = C1, c.C2 = C2, c.up = upsample;
  c.weights = (const float*)weights.data;
  c.kh = (int)weights.shape[0], c.kw = (int)weights.shape[1], c.N = c.all_N = (int)weights.shape[3];
  check.that(c.kh >= 1 && c.kw >= 1 && c.kh * c.kw <= MAX_TAPS, "w", "must have 1 to " + std::to_string(MAX_TAPS) + " taps");
  check.that(C1 + C2 <= MAX_CHANNELS && c.N <= MAX_CHANNELS, "w", "has too many channels");
  c.stride = stride, c.top = s.top, c.left = s.left;
  int H = h * upsample + s.top + s.bottom - c.kh, W = w * upsample + s.left + s.right - c.kw;
  check.that(H >= 0 && W >= 0, "x", "is smaller than the kernel");
  c.H = H / stride + 1, c.W = W / stride + 1;
  return c;
}

// The same, of the images x [beside x2].
Conv with_inputs(const Check& check, const View& x, const View& x2, const View& w, int stride, const Sides& sides,
                 int upsample) {
  check.array(x, "x", {ANY, ANY, ANY, ANY});
  int64_t B = x.shape[0], h = x.shape[1], wd = x.shape[2];
  if (x2) check.array(x2, "x2", {B, h, wd, ANY});
  Conv c = geometry(check, B, h, wd, x.shape[3], at(x2, 3), w, stride, sides, upsample);
  c.x = (const float*)x.data, c.x2 = x2 ? (const float*)x2.data : nullptr;
  return c;
}

int known_algorithm(const Check& check, const Conv& c, int algorithm) {
  bool winograd = (algorithm == 2 || algorithm == 4) && c.kh == 3 && c.kw == 3 && c.stride == 1;
  check.that(winograd || algorithm == CHOOSE || algorithm == DIRECT, "algorithm",
             "must be -1 or 0, or for 3x3 kernels with stride 1 2 or 4, got " + std::to_string(algorithm));
  return algorithm;
}

int kind_of(const Check& check, const std::string& kind, const char* argument) {
  const char* names[] = {"silu", "gelu_exact", "gelu_tanh", "gelu_quick"};
  for (int i = 0; i < 4; i++)
    if (kind == names[i]) return i;
  check.fail(argument, "must be silu, gelu_exact, gelu_tanh or gelu_quick, got " + kind);
}

}  // namespace

void conv2d_forward(View y, View x, View x2, View w, View b, View shift, View residual, int stride, Sides sides,
                    int upsample, bool silu, View prepared, int algorithm) {
  Check check{"conv2d_forward"};
  Conv c = with_inputs(check, x, x2, w, stride, sides, upsample);
  c.y = check.out(y, "y", {c.B, c.H, c.W, c.N});
  c.bias = check.maybe(b, "b", {c.N});
  c.shift = check.maybe(shift, "shift", {c.B, c.N});
  c.residual = check.maybe(residual, "residual", {c.B, c.H, c.W, c.N});
  c.silu = silu;
  c.algorithm = known_algorithm(check, c, algorithm);
  if (prepared) {
    check.that(kernels_in_use()->conv2d_prepared_size, "prepared", "is not for these kernels");
    c.prepared = check.in(prepared, "prepared", {kernels_in_use()->conv2d_prepared_size(c)});
  }
  kernels_in_use()->conv2d_forward(c);
}

void conv2d_backward(View dx, View dx2, View dw, View dshift, View dy, View x, View x2, View w, int stride, Sides sides,
                     int upsample, int algorithm) {
  Check check{"conv2d_backward"};
  Conv c = with_inputs(check, x, x2, w, stride, sides, upsample);
  c.algorithm = known_algorithm(check, c, algorithm);
  const float* g = check.in(dy, "dy", {c.B, c.H, c.W, c.N});
  kernels_in_use()->conv2d_backward(
      c, g, dx ? check.out(dx, "dx", {c.B, c.h, c.w, c.C1}) : nullptr, dx2 ? check.out(dx2, "dx2", {c.B, c.h, c.w, c.C2}) : nullptr,
      dw ? check.out(dw, "dw", w.shape) : nullptr, dshift ? check.out(dshift, "dshift", {c.B, c.N}) : nullptr);
}

int64_t conv2d_prepared_size(View w, int B, int height, int width, int stride, Sides sides, int upsample) {
  Check check{"conv2d_prepared_size"};
  check.array(w, "w", {ANY, ANY, ANY, ANY});
  return kernels_in_use()->conv2d_prepared_size(geometry(check, B, height, width, w.shape[2], 0, w, stride, sides, upsample));
}
void conv2d_prepare(View prepared, View w, int B, int height, int width, int stride, Sides sides, int upsample) {
  Check check{"conv2d_prepare"};
  check.array(w, "w", {ANY, ANY, ANY, ANY});
  Conv c = geometry(check, B, height, width, w.shape[2], 0, w, stride, sides, upsample);
  int64_t size = kernels_in_use()->conv2d_prepared_size(c);
  float* out = check.out(prepared, "prepared", {size});
  if (size) kernels_in_use()->conv2d_prepare(c, out);
}

static Linear layer(const Check& check, const View& x, const View& w, const std::string& activation) {
  check.array(x, "x", {ANY, ANY});
  int64_t M = x.shape[0], K = x.shape[1];
  check.array(w, "w", {K, ANY});
  Linear l;
  l.x = (const float*)x.data, l.w = (const float*)w.data, l.M = M, l.K = K, l.N = w.shape[1];
  l.activation = activation == "" ? NO_ACTIVATION : activation == "geglu" ? GEGLU : kind_of(check, activation, "activation");
  check.that(l.activation != GEGLU || l.N % 2 == 0, "activation", "geglu needs an even number of outputs");
  return l;
}
void linear_forward(View y, View z, View x, View w, View b, View residual, const std::string& activation) {
  Check check{"linear_forward"};
  Linear l = layer(check, x, w, activation);
  l.y = check.out(y, "y", {l.M, l.activation == GEGLU ? l.N / 2 : l.N});
  if (z) l.z = check.out(z, "z", {l.M, l.N});
  l.bias = check.maybe(b, "b", {l.N});
  l.residual = check.maybe(residual, "residual", {l.M, l.N});
  check.that(!z || l.activation != NO_ACTIVATION, "z", "is only there with an activation");
  check.that(!residual || l.activation != GEGLU, "residual", "and geglu exclude each other");
  kernels_in_use()->linear_forward(l);
}
void linear_backward(View dx, View dw, View db, View dy, View z, View x, View w, const std::string& activation) {
  Check check{"linear_backward"};
  Linear l = layer(check, x, w, activation);
  const float* g = check.in(dy, "dy", {l.M, l.activation == GEGLU ? l.N / 2 : l.N});
  if (l.activation != NO_ACTIVATION) l.z = (float*)check.in(z, "z", {l.M, l.N});
  kernels_in_use()->linear_backward(l, g, dx ? check.out(dx, "dx", {l.M, l.K}) : nullptr, check.out(dw, "dw", {l.K, l.N}),
                          db ? check.out(db, "db", {l.N}) : nullptr);
}

static GroupNorm group_norm(const Check& check, const View& x, const View& x2, const View& gain, const View& offset,
                            int groups) {
  check.array(x, "x", {ANY, ANY, ANY});
  GroupNorm g;
  g.B = x.shape[0], g.N = x.shape[1], g.groups = groups;
  g.inputs[0].x = (const float*)x.data, g.inputs[0].C = g.inputs[1].first = x.shape[2];
  if (x2) g.inputs[1].x = check.in(x2, "x2", {g.B, g.N, ANY}), g.inputs[1].C = x2.shape[2];
  g.C = g.inputs[0].C + g.inputs[1].C;
  check.that(groups >= 1 && g.C % groups == 0, "groups", "must divide the channels");
  int64_t many = rows_of(gain) == 1 ? 1 : g.B;
  g.gain = check.in(gain, "gain", {many, g.C});
  g.offset = check.in(offset, "offset", {many, g.C});
  g.gain_step = many == 1 ? 0 : g.C;
  return g;
}
void group_norm_forward(View y, View mean, View rstd, View x, View x2, View gain, View offset, int groups, double eps,
                        bool silu) {
  Check check{"group_norm_forward"};
  GroupNorm g = group_norm(check, x, x2, gain, offset, groups);
  g.y = check.out(y, "y", {g.B, g.N, g.C});
  g.mean = check.out(mean, "mean", {g.B, g.C});
  g.rstd = check.out(rstd, "rstd", {g.B, g.C});
  g.eps = eps, g.silu = silu;
  kernels_in_use()->group_norm_forward(g);
}
void group_norm_backward(View dx, View dx2, View dgain, View doffset, View dy, View x, View x2, View gain, View offset,
                         View mean, View rstd, int groups, bool silu) {
  Check check{"group_norm_backward"};
  GroupNorm g = group_norm(check, x, x2, gain, offset, groups);
  g.dy = check.in(dy, "dy", {g.B, g.N, g.C});
  g.inputs[0].dx = check.out(dx, "dx", x.shape);
  if (x2) g.inputs[1].dx = check.out(dx2, "dx2", x2.shape);
  g.mean = (float*)check.in(mean, "mean", {g.B, g.C});
  g.rstd = (float*)check.in(rstd, "rstd", {g.B, g.C});
  g.dgain = check.out(dgain, "dgain", {g.B, g.C});
  g.doffset = check.out(doffset, "doffset", {g.B, g.C});
  g.silu = silu;
  kernels_in_use()->group_norm_backward(g);
}

void layer_norm_forward(View y, View mean, View rstd, View x, View gamma, View beta, double eps) {
  Check check{"layer_norm_forward"};
  check.array(x, "x", {ANY, ANY});
  int64_t rows = x.shape[0], D = x.shape[1];
  check.that(D > 0, "x", "must have channels");
  kernels_in_use()->layer_norm_forward(check.out(y, "y", {rows, D}), check.out(mean, "mean", {rows}), check.out(rstd, "rstd", {rows}),
                             (const float*)x.data, check.in(gamma, "gamma", {D}), check.in(beta, "beta", {D}), rows, D, eps);
}
void layer_norm_backward(View dx, View dgamma, View dbeta, View dy, View x, View gamma, View mean, View rstd) {
  Check check{"layer_norm_backward"};
  check.array(x, "x", {ANY, ANY});
  int64_t rows = x.shape[0], D = x.shape[1];
  check.that(D > 0, "x", "must have channels");
  kernels_in_use()->layer_norm_backward(check.out(dx, "dx", {rows, D}), check.out(dgamma, "dgamma", {D}), check.out(dbeta, "dbeta", {D}),
                              check.in(dy, "dy", {rows, D}), (const float*)x.data, check.in(gamma, "gamma", {D}),
                              check.in(mean, "mean", {rows}), check.in(rstd, "rstd", {rows}), rows, D);
}

static Attention attention(const Check& check, const View& q, const View& k, const View& v, const View& bias, int heads,
                           double scale, bool causal) {
  check.array(q, "q", {ANY, ANY, ANY});
  int64_t B = q.shape[0], D = q.shape[2];
  check.array(k, "k", {B, ANY, D});
  int64_t Lk = k.shape[1];
  check.array(v, "v", {B, Lk, ANY});
  int64_t Dv = v.shape[2];
  check.that(heads >= 1 && D % heads == 0 && Dv % heads == 0, "heads", "must divide the widths");
  check.that(Lk > 0, "k", "must have at least one token");
  Attention a;
  a.B = B, a.heads = heads, a.Lq = q.shape[1], a.Lk = Lk, a.d = D / heads, a.dv = Dv / heads;
  check.that(a.d <= MAX_CHANNELS && a.dv <= MAX_CHANNELS, "q", "has too wide heads");
  a.q = (const float*)q.data, a.k = (const float*)k.data, a.v = (const float*)v.data;
  a.scale = (float)scale, a.causal = causal;
  if (bias) {
    check.array(bias, "bias", {B, heads, a.Lq, Lk}, false);
    a.bias = (const float*)bias.data;
    for (int i = 0; i < 4; i++) a.bias_strides[i] = bias.strides[i] / 4;
  }
  return a;
}
void attention_forward(View y, View lse, View q, View k, View v, View bias, int heads, double scale, bool causal) {
  Check check{"attention_forward"};
  Attention a = attention(check, q, k, v, bias, heads, scale, causal);
  a.y = check.out(y, "y", {a.B, a.Lq, a.dv * heads});
  if (lse) a.lse = check.out(lse, "lse", {a.B, heads, a.Lq});
  kernels_in_use()->attention_forward(a);
}
void attention_backward(View dq, View dk, View dv, View dy, View y, View lse, View q, View k, View v, View bias, int heads,
                        double scale, bool causal) {
  Check check{"attention_backward"};
  Attention a = attention(check, q, k, v, bias, heads, scale, causal);
  a.y = (float*)check.in(y, "y", {a.B, a.Lq, a.dv * heads});
  a.dy = check.in(dy, "dy", {a.B, a.Lq, a.dv * heads});
  a.lse = (float*)check.in(lse, "lse", {a.B, heads, a.Lq});
  a.dq = check.out(dq, "dq", q.shape);
  a.dk = check.out(dk, "dk", k.shape);
  a.dv_out = check.out(dv, "dv", v.shape);
  kernels_in_use()->attention_backward(a);
}

void pointwise_forward(View y, View x, const std::string& kind) {
  Check check{"pointwise_forward"};
  int64_t n = rows_of(x);
  kernels_in_use()->pointwise_forward(check.out(y, "y", {n}), check.in(x, "x", {n}), n,
                            kind_of(check, kind, "kind"));
}
void pointwise_backward(View dx, View dy, View x, const std::string& kind) {
  Check check{"pointwise_backward"};
  int64_t n = rows_of(x);
  kernels_in_use()->pointwise_backward(check.out(dx, "dx", {n}), check.in(dy, "dy", {n}), check.in(x, "x", {n}), n,
                             kind_of(check, kind, "kind"));
}
void geglu_forward(View y, View x) {
  Check check{"geglu_forward"};
  check.array(x, "x", {ANY, ANY});
  check.that(x.shape[1] % 2 == 0, "x", "must have two halves");
  int64_t rows = x.shape[0], D = x.shape[1] / 2;
  kernels_in_use()->geglu_forward(check.out(y, "y", {rows, D}), (const float*)x.data, rows, D);
}
void geglu_backward(View dx, View dy, View x) {
  Check check{"geglu_backward"};
  check.array(x, "x", {ANY, ANY});
  check.that(x.shape[1] % 2 == 0, "x", "must have two halves");
  int64_t rows = x.shape[0], D = x.shape[1] / 2;
  kernels_in_use()->geglu_backward(check.out(dx, "dx", x.shape), check.in(dy, "dy", {rows, D}), (const float*)x.data, rows, D);
}
void add(View y, View a, View b) {
  Check check{"add"};
  int64_t n = rows_of(a);
  kernels_in_use()->add(check.out(y, "y", {n}), check.in(a, "a", {n}), check.in(b, "b", {n}), n);
}
void mse_forward(View y, View a, View b) {
  Check check{"mse_forward"};
  int64_t n = rows_of(a);
  check.that(n > 0, "a", "must have elements");
  kernels_in_use()->mse_forward(check.out(y, "y", {1}), check.in(a, "a", {n}), check.in(b, "b", {n}), n);
}
void mse_backward(View da, View dy, View a, View b) {
  Check check{"mse_backward"};
  int64_t n = rows_of(a);
  kernels_in_use()->mse_backward(check.out(da, "da", {n}), check.in(dy, "dy", {1}), check.in(a, "a", {n}),
                                 check.in(b, "b", {n}), n);
}
void gradient_norm(View y, std::vector<View> g) {
  Check check{"gradient_norm"};
  std::vector<Update> list(g.size());
  for (size_t i = 0; i < g.size(); i++) {
    check.array(g[i], "g", g[i].shape);
    list[i] = {g[i].size(), nullptr, nullptr, nullptr, nullptr, (const float*)g[i].data, 0};
  }
  kernels_in_use()->gradient_norm(check.out(y, "y", {1}), list.data(), (int)list.size());
}

static const StepNumbers* step_numbers(const Check& check, const View& numbers) {
  return (const StepNumbers*)check.in(numbers, "numbers", {sizeof(StepNumbers) / sizeof(float)});
}
static void of_one_length(const Check& check, size_t count, std::initializer_list<size_t> others) {
  for (size_t n : others) check.that(n == count, "p", "and the other lists must be of one length");
}

void adamw_update(std::vector<View> p, std::vector<View> g, std::vector<View> m, std::vector<View> v,
                  std::vector<View> ema, std::vector<double> decay, View numbers) {
  Check check{"adamw_update"};
  of_one_length(check, p.size(), {g.size(), m.size(), v.size(), ema.size(), decay.size()});
  std::vector<Update> updates(p.size());
  for (size_t i = 0; i < p.size(); i++) {
    const auto& shape = p[i].shape;
    updates[i] = {p[i].size(),
                  check.update(p[i], "p", shape),
                  check.update(m[i], "m", shape),
                  check.update(v[i], "v", shape),
                  check.update(ema[i], "ema", shape),
                  check.in(g[i], "g", shape),
                  (float)decay[i]};
  }
  kernels_in_use()->adamw(updates.data(), (int)updates.size(), step_numbers(check, numbers));
}
void muon_momentum(std::vector<View> u, std::vector<View> g, std::vector<View> m, View numbers) {
  Check check{"muon_momentum"};
  of_one_length(check, u.size(), {g.size(), m.size()});
  std::vector<Update> updates(u.size());
  for (size_t i = 0; i < u.size(); i++) {
    const auto& shape = u[i].shape;
    updates[i] = {u[i].size(), check.out(u[i], "u", shape), check.update(m[i], "m", shape), nullptr, nullptr,
                  check.in(g[i], "g", shape), 0};
  }
  kernels_in_use()->momentum(updates.data(), (int)updates.size(), step_numbers(check, numbers));
}
void descend(std::vector<View> p, std::vector<View> u, std::vector<View> ema, std::vector<double> length,
             std::vector<double> decay, View numbers) {
  Check check{"descend"};
  of_one_length(check, p.size(), {u.size(), ema.size(), length.size(), decay.size()});
  std::vector<Update> updates(p.size());
  for (size_t i = 0; i < p.size(); i++) {
    const auto& shape = p[i].shape;
    updates[i] = {p[i].size(), check.update(p[i], "p", shape), nullptr, nullptr, check.update(ema[i], "ema", shape),
                  check.in(u[i], "u", shape), (float)decay[i], (float)length[i]};
  }
  kernels_in_use()->descend(updates.data(), (int)updates.size(), step_numbers(check, numbers));
}

void orthogonalise(std::vector<View> x, std::vector<View> g) {
  Check check{"orthogonalise"};
  check.that(x.size() == g.size(), "x", "and g must be lists of one length");
  std::vector<Orthogonal> list(x.size());
  for (size_t i = 0; i < x.size(); i++) {
    check.array(g[i], "g", {ANY, ANY});
    int64_t rows = g[i].shape[0], columns = g[i].shape[1], n = std::min(rows, columns);
    check.that(n >= 1 && n <= MAX_CHANNELS, "g", "must have 1 to " + std::to_string(MAX_CHANNELS) + " rows or columns");
    float* to = check.out(x[i], "x", {rows, columns});
    list[i] = {std::max(rows, columns), (int)n, (const float*)g[i].data, to, columns > rows};
  }
  kernels_in_use()->orthogonalise(list.data(), (int)list.size());
}

static ReverseStep step_of(const Check& check, const std::vector<int64_t>& shape, const View& x_prev, const View& x0,
                           const View& eps, const View& x_t, const View& eps_cond, const View& eps_uncond) {
  ReverseStep s;
  s.x_t = check.in(x_t, "x_t", shape), s.n = x_t.size();
  s.x_prev = check.out(x_prev, "x_prev", x_t.shape), s.x0 = check.out(x0, "x0", x_t.shape);
  s.eps = check.out(eps, "eps", x_t.shape), s.eps_cond = check.in(eps_cond, "eps_cond", x_t.shape);
  s.eps_uncond = check.maybe(eps_uncond, "eps_uncond", x_t.shape);
  return s;
}
static void set(ReverseStep& s, double w, double signal, double noise, double clip, double of_x0, double of_eps, double of_z) {
  s.w = (float)w, s.signal = (float)signal, s.noise = (float)noise, s.clip = (float)clip;
  s.of_x0 = (float)of_x0, s.of_eps = (float)of_eps, s.of_z = (float)of_z;
}
static Draws draws(uint64_t seed, const std::vector<int64_t>& samples, uint32_t step, uint32_t purpose) {
  return {samples.data(), (long)samples.size(), seed, step, purpose};
}

void reverse_step(View x_prev, View x0, View eps, View x_t, View eps_cond, View eps_uncond, View z, double w, double signal,
                  double noise, double clip, double of_x0, double of_eps, double of_z) {
  Check check{"reverse_step"};
  ReverseStep s = step_of(check, {ANY}, x_prev, x0, eps, x_t, eps_cond, eps_uncond);
  s.z = check.maybe(z, "z", x_t.shape);
  set(s, w, signal, noise, clip, of_x0, of_eps, of_z);
  kernels_in_use()->reverse_step(s);
}
void reverse_step_drawn(View x_prev, View x0, View eps, View x_t, View eps_cond, View eps_uncond, double w, double signal,
                        double noise, double clip, double of_x0, double of_eps, double of_z, uint64_t seed,
                        std::vector<int64_t> samples, uint32_t step, uint32_t purpose) {
  Check check{"reverse_step_drawn"};
  ReverseStep s = step_of(check, {(int64_t)samples.size(), ANY}, x_prev, x0, eps, x_t, eps_cond, eps_uncond);
  set(s, w, signal, noise, clip, of_x0, of_eps, of_z);
  kernels_in_use()->reverse_step_drawn(s, draws(seed, samples, step, purpose));
}

void normal(View out, uint64_t seed, std::vector<int64_t> samples, uint32_t step, uint32_t purpose) {
  Check check{"normal"};
  float* to = check.out(out, "out", {(int64_t)samples.size(), ANY});
  kernels_in_use()->normal(to, draws(seed, samples, step, purpose), out.shape[1]);
}

void q_sample_drawn(View x_t, View target, View x0, View signal, View noise, bool of_v, uint64_t seed,
                    std::vector<int64_t> samples, uint32_t step, uint32_t purpose) {
  Check check{"q_sample_drawn"};
  int64_t count = (int64_t)samples.size();
  QSample q;
  q.x0 = check.in(x0, "x0", {count, ANY}), q.elements = x0.shape[1];
  q.x_t = check.out(x_t, "x_t", x0.shape);
  if (target) q.target = check.out(target, "target", x0.shape);
  q.signal = check.in(signal, "signal", {count}), q.noise = check.in(noise, "noise", {count});
  q.of_v = of_v;
  kernels_in_use()->q_sample_drawn(q, draws(seed, samples, step, purpose));
}

}  // namespace minidiff
