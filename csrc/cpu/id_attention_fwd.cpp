#include "cpu/id_attention_fwd.h"

#include <algorithm>
#include <new>

#include "cpu/claims.h"
#include "cpu/workspace.h"

namespace idcore {
namespace cpu {
namespace {

// Below this many multiply-adds waking the other threads costs more than they bring.
constexpr int64_t kSerialWork = 1 << 18;
// Rows of one work item of ortho_v2's first step (our choice).
constexpr int64_t kShareRows = 64;
static_assert(kChunkRows % kShareRows == 0, "a block must not straddle two items");

int64_t length_of(const IdAttentionParams& p, int branch) {
  return branch == 0 ? p.lt : p.identity[branch - 1].length;
}

// The first key (or value) that head h of sample b reads, and the distance between rows, in bytes.
struct Source {
  const char* rows;
  int64_t row_bytes;
};

Source source_of(const IdAttentionParams& p, int branch, bool keys, int64_t b, int64_t h) {
  const Identity* id = branch == 0 ? nullptr : &p.identity[branch - 1];
  const HeadTensor& t = id == nullptr ? (keys ? p.k_text : p.v_text) : (keys ? id->k : id->v);
  int64_t at = b * t.batch / p.batch * t.stride_batch + h * t.stride_head;
  if (id == nullptr && p.stage.index != nullptr) {
    const int64_t wanted = p.stage.index[b * p.stage.stride];
    const int64_t stage = std::min(std::max<int64_t>(wanted, 0), p.stage.count - 1);
    at += stage * (keys ? p.stage.k_stride : p.stage.v_stride);
  }
  const int64_t bytes = p.dtype == DType::kFloat32 ? 4 : 2;
  return Source{static_cast<const char*>(t.data) + at * bytes, t.stride_row * bytes};
}

// What a thread owns.
struct Own {
  float* scratch;
  Head head;
  const char* packed_k[kMaxBranches];  // where the packed ones came from
  const char* packed_v[kMaxBranches];
  IdentityKeys keys;
  int64_t keys_batch;  // the sample that `keys` were packed for, or -1
  // First passes that wait for their unit's sums, oldest first, and the ring of chunks that they fill.
  Run* waiting;
  int64_t waiting_from, waiting_to, chunks_from, chunks_to;
  char* text;
  float* mixed;
};

class Call {
 public:
  Call(const IdAttentionParams& params, const Kernels& kernels, const IdAttentionStats& stats)
      : p_(params), k_(kernels), n_(params.num_identities), units_(params.batch * params.heads) {
    plan_.params = &p_;
    plan_.stats = stats;
    plan_.pairs = k_.has_pairs && p_.dtype == DType::kBFloat16 && p_.head_dim % 2 == 0;
    plan_.chunks = (p_.lq + kChunkRows - 1) / kChunkRows;
    plan_.padded_dim = (p_.head_dim + k_.lanes - 1) / k_.lanes * k_.lanes;
    two_passes_ = p_.merge != Merge::kAdd && n_ > 0;
    shares_ = two_passes_ && p_.merge == Merge::kOrthoV2;
    few_ = p_.dtype != DType::kFloat32 && p_.lq <= kFewRows;
    wait_bytes_ = p_.dtype == DType::kFloat32 || few_ ? 4 : 2;
    int64_t keys = 0;
    for (int b = 0; b <= n_; ++b) keys += length_of(p_, b);
    plan_.row_floats = k_.row_floats(keys, p_.head_dim);
    for (int j = 0; j < n_; ++j)
      plan_.ready_rows += (plan_.pairs ? (length_of(p_, j + 1) + 1) / 2 : length_of(p_, j + 1)) + 1;
    threads_ = threads_for(units_ * p_.lq * p_.head_dim * keys);
  }

  void run() {
    lay_out(nullptr);
    char* base = thread_workspace().at_least(bytes_);
    lay_out(base);
    if (two_passes_) {
      for (int64_t u = 0; u < units_; ++u) new (left_ + u) std::atomic<int64_t>(plan_.chunks);
    }
    Claims claims(units_, plan_.chunks, threads_);
#pragma omp parallel num_threads(threads_)
    {
      const FlushSubnormals flush;
      Own own = own_of(base, thread_number());
      if (shares_) share(own);
      attend(own, claims);
    }
  }

 private:
  int threads_for(int64_t work) const {
#if defined(_OPENMP)
    if (work < kSerialWork || omp_in_parallel()) return 1;
    return static_cast<int>(std::min<int64_t>(omp_get_max_threads(), units_ * plan_.chunks));
#else
    (void)work;
    return 1;
#endif
  }

  // Chunks that wait for a thread, in a ring. As many as a unit has: then whoever waits for room waits for an
  // older unit. With more threads than units all chunks fit, in their own places.
  int64_t ring() const { return plan_.chunks; }
  bool all_wait() const { return threads_ > units_; }
  int64_t waiting_runs() const { return all_wait() ? units_ * plan_.chunks : ring(); }

  void lay_out(char* base) {
    Pieces pieces(base);
    const int64_t rows = plan_.chunks * kChunkRows;
    left_ = pieces.take<std::atomic<int64_t>>(two_passes_ ? units_ : 0);
    sums_ = pieces.take<float>(two_passes_ ? units_ * plan_.chunks * n_ * 2 * plan_.padded_dim : 0);
    alpha_ = pieces.take<float>(two_passes_ ? units_ * n_ * plan_.padded_dim : 0);
    plan_.share = shares_ ? pieces.take<float>(n_ * p_.batch * rows) : nullptr;
    plan_.ready = shares_ ? pieces.take<float>(units_ * rows * plan_.ready_rows) : nullptr;
    if (two_passes_ && all_wait()) take_waiting(pieces, units_ * plan_.chunks, &text_, &mixed_);
    shared_bytes_ = (pieces.used() + 4095) / 4096 * 4096;
    Pieces own(nullptr);
    take_own(own);
    own_bytes_ = (own.used() + 4095) / 4096 * 4096;
    bytes_ = shared_bytes_ + own_bytes_ * threads_;
  }

  Own own_of(char* base, int thread) const {
    Pieces pieces(base + shared_bytes_ + own_bytes_ * thread);
    return take_own(pieces);
  }

  Own take_own(Pieces& pieces) const {
    Own own{};
    own.keys_batch = -1;
    own.scratch = pieces.take<float>(plan_.row_floats);
    for (int b = 0; b <= n_; ++b) {
      own.head.k[b] = pieces.take<float>(k_.packed_k_words(length_of(p_, b), p_.head_dim, plan_.pairs));
      own.head.v[b] = pieces.take<float>(k_.packed_v_words(length_of(p_, b), p_.head_dim, plan_.pairs));
    }
    for (int j = 0; shares_ && j < n_; ++j) {
      const int64_t words = k_.packed_k_words(length_of(p_, j + 1), p_.head_dim, plan_.pairs);
      own.keys.stride_head[j] = (words + 15) / 16 * 16;
      own.keys.data[j] = pieces.take<float>(own.keys.stride_head[j] * p_.heads);
    }
    if (!two_passes_) return own;
    own.waiting = pieces.take<Run>(waiting_runs());
    if (all_wait()) {
      own.text = text_;
      own.mixed = mixed_;
    } else {
      take_waiting(pieces, ring(), &own.text, &own.mixed);
    }
    return own;
  }

  void take_waiting(Pieces& pieces, int64_t chunks, char** text, float** mixed) const {
    *text = pieces.take<char>(chunks * wait_size());
    *mixed = few_ ? pieces.take<float>(chunks * wait_size() / 4) : nullptr;
  }

  // Bytes of h of one chunk.
  int64_t wait_size() const { return kChunkRows * plan_.padded_dim * wait_bytes_; }

  // Step 0 of ortho_v2: the identities' probabilities of all rows, and `a`.
  void share(Own& own) {
    const int64_t pieces = (p_.lq + kShareRows - 1) / kShareRows;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < p_.batch * pieces; ++i) {
      const int64_t b = i / pieces, row = i % pieces * kShareRows;
      if (own.keys_batch != b) pack_identity_keys(own, b);
      k_.identities(plan_, own.keys, b, row, std::min(row + kShareRows, p_.lq), own.scratch);
    }
  }

  void pack_identity_keys(Own& own, int64_t b) {
    own.keys_batch = b;
    for (int j = 0; j < n_; ++j) {
      for (int64_t h = 0; h < p_.heads; ++h) {
        const Source k = source_of(p_, j + 1, true, b, h);
        k_.pack_k(plan_, k.rows, k.row_bytes, length_of(p_, j + 1),
                  own.keys.data[j] + h * own.keys.stride_head[j]);
      }
    }
  }

  void pack(Own& own, int64_t unit) {
    own.head.batch = unit % p_.batch;
    own.head.head = unit / p_.batch;
    for (int b = 0; b <= n_; ++b) {
      const Source k = source_of(p_, b, true, own.head.batch, own.head.head);
      const Source v = source_of(p_, b, false, own.head.batch, own.head.head);
      if (k.rows != own.packed_k[b] && (b == 0 || !shares_))
        k_.pack_k(plan_, k.rows, k.row_bytes, length_of(p_, b), own.head.k[b]);
      if (v.rows != own.packed_v[b]) k_.pack_v(plan_, v.rows, v.row_bytes, length_of(p_, b), own.head.v[b]);
      own.packed_k[b] = k.rows;
      own.packed_v[b] = v.rows;
    }
  }

  void attend(Own& own, Claims& claims) {
    Run run;
    while (claims.take(&run)) {
      pack(own, run.unit);
      if (!two_passes_) {
        for (int64_t c = 0; c < run.count; ++c)
          k_.attend(plan_, own.head, run.first + c, Waiting{}, own.scratch);
        continue;
      }
      while (!all_wait() && own.chunks_to + run.count > own.chunks_from + ring()) finish_oldest(own);
      for (int64_t c = 0; c < run.count; ++c)
        k_.attend(plan_, own.head, run.first + c, waiting(own, run, c, own.chunks_to), own.scratch);
      own.chunks_to += run.count;
      own.waiting[own.waiting_to++ % waiting_runs()] = run;
      if (left_[run.unit].fetch_sub(run.count, std::memory_order_acq_rel) == run.count) {
        ratios(run.unit);
        left_[run.unit].store(-1, std::memory_order_release);
      }
      while (own.waiting_from < own.waiting_to && done(own.waiting[own.waiting_from % waiting_runs()]))
        finish_oldest(own);
    }
    while (own.waiting_from < own.waiting_to) finish_oldest(own);
  }

  bool done(const Run& run) const { return left_[run.unit].load(std::memory_order_acquire) < 0; }

  // Where chunk c of a run waits whose first chunk stands at `from` in the ring.
  Waiting waiting(const Own& own, const Run& run, int64_t c, int64_t from) const {
    const int64_t item = run.unit * plan_.chunks + run.first + c;
    const int64_t slot = all_wait() ? item : (from + c) % ring();
    return Waiting{own.text + slot * wait_size(),
                   own.mixed == nullptr ? nullptr : own.mixed + slot * wait_size() / 4,
                   sums_ + item * n_ * 2 * plan_.padded_dim};
  }

  // The second pass over the run that has waited longest; its last chunk first, which is still in the cache.
  void finish_oldest(Own& own) {
    const Run run = own.waiting[own.waiting_from % waiting_runs()];
    wait_until([&] { return done(run); });
    for (int64_t c = run.count; c-- > 0;) {
      k_.finish(plan_, run.unit % p_.batch, run.unit / p_.batch, run.first + c,
                waiting(own, run, c, own.chunks_from), alpha_ + run.unit * n_ * plan_.padded_dim);
    }
    own.chunks_from += run.count;
    ++own.waiting_from;
  }

  // alpha = sum w h i / sum w h h over a unit's chunks, in their order and in double; 0 where the denominator
  // is 0.
  void ratios(int64_t unit) {
    const int64_t width = plan_.padded_dim, b = unit % p_.batch, h = unit / p_.batch;
    for (int64_t j = 0; j < n_; ++j) {
      double sums[2 * kMaxHeadDim] = {};
      for (int64_t c = 0; c < plan_.chunks; ++c) {
        const float* s = sums_ + ((unit * plan_.chunks + c) * n_ + j) * 2 * width;
        for (int64_t d = 0; d < 2 * width; ++d) sums[d] += s[d];
      }
      float* alpha = alpha_ + (unit * n_ + j) * width;
      for (int64_t d = 0; d < width; ++d)
        alpha[d] = sums[width + d] == 0.0 ? 0.0f : static_cast<float>(sums[d] / sums[width + d]);
      if (plan_.stats.den == nullptr) continue;
      const int64_t at = ((j * p_.batch + b) * p_.heads + h) * p_.head_dim;
      for (int64_t d = 0; d < p_.head_dim; ++d) {
        plan_.stats.alpha[at + d] = alpha[d];
        plan_.stats.den[at + d] = static_cast<float>(sums[width + d]);
      }
    }
  }

  const IdAttentionParams& p_;
  const Kernels& k_;
  const int64_t n_, units_;
  Plan plan_{};
  bool two_passes_ = false, shares_ = false, few_ = false;
  int64_t wait_bytes_ = 0;
  int threads_ = 1;
  size_t bytes_ = 0, shared_bytes_ = 0, own_bytes_ = 0;
  std::atomic<int64_t>* left_ = nullptr;  // chunks that a unit lacks; -1: its alpha is there. [units]
  float* sums_ = nullptr;                 // [units, chunks, n, 2, padded_dim]
  float* alpha_ = nullptr;                // [units, n, padded_dim]
  char* text_ = nullptr;                  // all_wait(): h and u of all chunks
  float* mixed_ = nullptr;
};

}  // namespace

void id_attention_fwd(const IdAttentionParams& params, const Kernels& kernels,
                      const IdAttentionStats& stats) {
  if (params.batch == 0 || params.heads == 0 || params.lq == 0 || params.head_dim == 0) return;
  Call(params, kernels, stats).run();
}

}  // namespace cpu
}  // namespace idcore
