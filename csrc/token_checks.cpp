#include "token_checks.h"

#include <algorithm>
#include <climits>
#include <cstdio>

#include "overlap.h"

namespace fastcache {

namespace {

void check_shape(const char* name, int64_t j, const Tensor& t, const int64_t* sizes, int64_t rank) {
  if (t.rank == rank && std::equal(sizes, sizes + rank, t.sizes)) return;
  std::string expected = indexed(name, j) + ": expected [";
  for (int64_t i = 0; i < rank; ++i) expected.append(i ? ", " : "").append(number(sizes[i]));
  fail(expected + "], got " + text(t));
}

void check_rows(const char* name, int64_t j, const Tensor& t, int64_t rank, const char* shape) {
  if (t.rank != rank) fail(indexed(name, j) + ": expected " + shape + ", got " + text(t));
  check_floating(name, j, t, false);
  check_unit_stride(name, j, t);
}

std::string shortest(double value) {
  char digits[32];
  std::snprintf(digits, sizeof(digits), "%g", value);
  return digits;
}

}  // namespace

SelectArguments::SelectArguments(const StableIValue* stack, uint64_t inputs, uint64_t outputs)
    : boxed(stack, inputs, outputs, "twtifbiif", 2),
      score(boxed.tensor(0)),
      age(boxed.tensor(1)),
      counts(boxed.tensor(2)),
      capacity(boxed.integer(3)),
      width(boxed.integer(6)),
      cell(boxed.integer(7)),
      age_weight(boxed.real(4)),
      bonus(boxed.real(8)),
      normalize(boxed.flag(5)) {}

void SelectArguments::check() const {
  if (score.rank != 2) fail("score: expected [R, N], got " + text(score));
  if (score.type == Type::kFloat64) check_floating("score", -1, score, false);
  if (score.type != Type::kFloat32)
    fail(std::string("score: expected float32 (or float64 in eager), got ") + text(score.type));
  const int64_t N = score.sizes[1];
  check_shape("age", -1, age, score.sizes, 2);
  check_dtype("age", -1, age, Type::kInt32);
  check_device("age", -1, age, score);
  check_shape("counts", -1, counts, score.sizes, 1);
  check_dtype("counts", -1, counts, Type::kInt32);
  check_device("counts", -1, counts, score);
  if (capacity < 0) fail("capacity: expected 0 or more, got " + number(capacity));
  if (cell < 0) fail("cell: expected 0 (no bonus) or more tokens a side, got " + number(cell));
  if (cell > 0 && !(width > 0 && N % width == 0 && width % cell == 0 && N / width % cell == 0)) {
    fail("width, cell: expected a grid of " + number(cell) + " x " + number(cell) + " cells over " +
         number(N) + " tokens, " + number(width) + " a line, got sides that " + number(cell) +
         " does not divide");
  }
  if (cell == 0 && bonus != 0.0)
    fail("cell: a bonus of " + shortest(bonus) + " needs cells of 1 or more tokens a side, got 0");
  if (overlaps_itself(age))
    fail("age: its elements share memory; it is written in place, call .contiguous()");
  if (overlap(age, score) || overlap(age, counts))
    fail("age: is written in place and shares memory with another argument; give it memory of its own");
}

void SelectArguments::check_counts() const {
  const int64_t most = std::min(score.sizes[1], capacity);
  int32_t low = INT_MAX, high = INT_MIN;
  for (int64_t r = 0; r < counts.sizes[0]; ++r) {
    const int32_t count = reinterpret_cast<const int32_t*>(counts.data)[r * counts.strides[0]];
    low = std::min(low, count);
    high = std::max(high, count);
  }
  if (low < 0 || high > most)
    fail("counts: expected 0.." + number(most) + " (tokens, and capacity), got " + number(low) + ".." +
         number(high));
}

RowScoreArguments::RowScoreArguments(const StableIValue* stack, uint64_t inputs, uint64_t outputs)
    : boxed(stack, inputs, outputs, "to", 1), x(boxed.tensor(0)), reference(boxed.tensor(1)) {}

void RowScoreArguments::check() const {
  check_rows("x", -1, x, 3, "[B, N, D]");
  if (!reference) return;
  check_shape("reference", -1, reference, x.sizes, 3);
  check_rows("reference", -1, reference, 3, "[B, N, D]");
  check_device("reference", -1, reference, x);
}

ValueNormArguments::ValueNormArguments(const StableIValue* stack, uint64_t inputs, uint64_t outputs)
    : boxed(stack, inputs, outputs, "t", 1), v(boxed.tensor(0)) {}

void ValueNormArguments::check() const { check_rows("v", -1, v, 4, "[B, H, N, d]"); }

AttentionArguments::AttentionArguments(const StableIValue* stack, uint64_t inputs, uint64_t outputs)
    : boxed(stack, inputs, outputs, "ttof", 1),
      q(boxed.tensor(0)),
      k(boxed.tensor(1)),
      lse(boxed.tensor(2)),
      scale(torch::stable::detail::to<std::optional<double>>(stack[3])) {}

void AttentionArguments::check() const {
  check_rows("q", -1, q, 4, "[B, H, N, d]");
  check_rows("k", -1, k, 4, "[B, H, M, d]");
  if (k.sizes[0] != q.sizes[0] || k.sizes[1] != q.sizes[1] || k.sizes[3] != q.sizes[3]) {
    fail("k: expected [" + number(q.sizes[0]) + ", " + number(q.sizes[1]) + ", M, " + number(q.sizes[3]) +
         "], got " + text(k));
  }
  if (k.dtype != q.dtype) fail(std::string("k: expected ") + text(q.type) + " as q, got " + text(k.type));
  check_device("k", -1, k, q);
  if (!lse) return;
  check_shape("lse", -1, lse, q.sizes, 3);
  check_dtype("lse", -1, lse, Type::kFloat32);
  check_device("lse", -1, lse, q);
}

ErrorArguments::ErrorArguments(const StableIValue* stack, uint64_t inputs, uint64_t outputs)
    : boxed(stack, inputs, outputs, "ll", 1),
      newest(boxed.list(0)),
      earlier(boxed.list(1)),
      layers(boxed.length(0)),
      earlier_count(boxed.length(1)) {}

void ErrorArguments::check() const {
  if (layers == 0) fail("newest: expected at least one feature, got none");
  if (earlier_count % layers != 0) {
    fail("earlier: expected a multiple of " + number(layers) +
         " features (one per newest and look-ahead), got " + number(earlier_count));
  }
  if (earlier_count > kMaxTerms)
    fail("earlier: at most " + number(kMaxTerms) + " in one call, got " + number(earlier_count));
  const struct {
    const char* name;
    const Tensor* tensors;
    int64_t count;
  } lists[] = {{"newest", newest, layers}, {"earlier", earlier, earlier_count}};
  for (const auto& list : lists) {
    for (int64_t j = 0; j < list.count; ++j) {
      const Tensor& tensor = list.tensors[j];
      check_rows(list.name, j, tensor, 3, "[B, N, D]");
      check_shape(list.name, j, tensor, like().sizes, 3);
      if (tensor.dtype != like().dtype) {
        fail(indexed(list.name, j) + ": all features have one dtype, expected " + text(like().type) +
             ", got " + text(tensor.type));
      }
      check_device(list.name, j, tensor, like());
    }
  }
}

}  // namespace fastcache
