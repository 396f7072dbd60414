#include "cpu/id_attention_fwd.h"

#include <algorithm>
#include <new>

#include "cpu/claims.h"
#include "cpu/team.h"
#include "cpu/workspace.h"

namespace idcore {
namespace cpu {
namespace {

// Below this many multiply-adds waking the other threads costs more than they bring.
constexpr int64_t kSerialWork = 1 << 18;
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
  int thread;
  float* scratch;
  Head head;
  const char* packed_k[kMaxBranches];  // where the packed ones came from
  const char* packed_v[kMaxBranches];
  // First passes that wait for their unit's sums, oldest first, and the ring of chunks that the latest fill.
  Run* waiting;
  int64_t waiting_from, waiting_to, ring_from, ring_to;
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
    // Backward computes in float32, and for few rows its h must be the one that alpha was made of.
    if (stats.den != nullptr && p_.lq <= kFewRows) plan_.pairs = false;
    plan_.chunks = (p_.lq + kChunkRows - 1) / kChunkRows;
    plan_.padded_dim = (p_.head_dim + k_.lanes - 1) / k_.lanes * k_.lanes;
    two_passes_ = p_.merge != Merge::kAdd && n_ > 0;
    shares_ = two_passes_ && p_.merge == Merge::kOrthoV2;
    few_ = p_.dtype != DType::kFloat32 && p_.lq <= kFewRows;
    wait_bytes_ = p_.dtype == DType::kFloat32 || few_ ? 4 : 2;
    int64_t keys = 0;
    for (int b = 0; b <= n_; ++b) keys += length_of(p_, b);
    plan_.row_floats = k_.row_floats(keys, p_.head_dim);
    threads_ = team_size(units_ * p_.lq * p_.head_dim * keys, kSerialWork);
  }

  void run() {
    lay_out(nullptr);
    char* base = thread_workspace().at_least(bytes_);
    lay_out(base);
    if (two_passes_) {
      for (int64_t u = 0; u < units_; ++u) new (left_ + u) std::atomic<int64_t>(plan_.chunks);
    }
    Claims claims(regions_, threads_, units_, plan_.chunks);
#pragma omp parallel num_threads(threads_)
    {
      const FlushSubnormals flush;
      Own own = own_of(base, thread_number());
      attend(own, claims);
      if (shares_) {
#pragma omp barrier
        means();
      }
      while (own.waiting_from < own.waiting_to) finish(own, own.waiting[--own.waiting_to]);
    }
  }

 private:
  // Chunks of the ring in which a thread keeps what waits for a second pass; small, so that it stays in the
  // cache. None for ortho_v2: its `a` is a mean over heads, so that nobody may finish before all have
  // attended.
  int64_t ring() const { return shares_ ? 0 : plan_.chunks; }

  void lay_out(char* base) {
    Pieces pieces(base);
    const int64_t rows = plan_.chunks * kChunkRows;
    regions_ = pieces.take<Claims::Region>(threads_);
    left_ = pieces.take<std::atomic<int64_t>>(two_passes_ ? units_ : 0);
    sums_ = pieces.take<float>(two_passes_ ? units_ * plan_.chunks * n_ * 2 * plan_.padded_dim : 0);
    alpha_ = pieces.take<float>(two_passes_ ? units_ * n_ * plan_.padded_dim : 0);
    plan_.share = shares_ ? pieces.take<float>(n_ * units_ * rows) : nullptr;
    plan_.mean = shares_ ? pieces.take<float>(n_ * p_.batch * rows) : nullptr;
    if (two_passes_) take_waiting(pieces, units_ * plan_.chunks, &text_, &mixed_);
    shared_bytes_ = (pieces.used() + 4095) / 4096 * 4096;
    Pieces own(nullptr);
    take_own(own);
    own_bytes_ = (own.used() + 4095) / 4096 * 4096;
    bytes_ = shared_bytes_ + own_bytes_ * threads_;
  }

  Own own_of(char* base, int thread) const {
    Pieces pieces(base + shared_bytes_ + own_bytes_ * thread);
    Own own = take_own(pieces);
    own.thread = thread;
    return own;
  }

  Own take_own(Pieces& pieces) const {
    Own own{};
    own.scratch = pieces.take<float>(plan_.row_floats);
    for (int b = 0; b <= n_; ++b) {
      own.head.k[b] = pieces.take<float>(k_.packed_k_words(length_of(p_, b), p_.head_dim, plan_.pairs));
      own.head.v[b] = pieces.take<float>(k_.packed_v_words(length_of(p_, b), p_.head_dim, plan_.pairs));
    }
    if (!two_passes_) return own;
    own.waiting = pieces.take<Run>(units_ * plan_.chunks);
    take_waiting(pieces, ring(), &own.text, &own.mixed);
    return own;
  }

  void take_waiting(Pieces& pieces, int64_t chunks, char** text, float** mixed) const {
    *text = pieces.take<char>(chunks * wait_size());
    *mixed = few_ ? pieces.take<float>(chunks * wait_size() / 4) : nullptr;
  }

  // Bytes of h of one chunk.
  int64_t wait_size() const { return kChunkRows * plan_.padded_dim * wait_bytes_; }

  void pack(Own& own, int64_t unit) {
    own.head.batch = unit % p_.batch;
    own.head.head = unit / p_.batch;
    for (int b = 0; b <= n_; ++b) {
      const Source k = source_of(p_, b, true, own.head.batch, own.head.head);
      const Source v = source_of(p_, b, false, own.head.batch, own.head.head);
      if (k.rows != own.packed_k[b]) k_.pack_k(plan_, k.rows, k.row_bytes, length_of(p_, b), own.head.k[b]);
      if (v.rows != own.packed_v[b]) k_.pack_v(plan_, v.rows, v.row_bytes, length_of(p_, b), own.head.v[b]);
      own.packed_k[b] = k.rows;
      own.packed_v[b] = v.rows;
    }
  }

  void attend(Own& own, Claims& claims) {
    Run run;
    while (claims.take(own.thread, &run)) {
      pack(own, run.unit);
      if (two_passes_ && own.ring_to + run.count <= own.ring_from + ring()) {
        run.slot = own.ring_to;
        own.ring_to += run.count;
      }
      for (int64_t c = 0; c < run.count; ++c)
        k_.attend(plan_, own.head, run.first + c, waiting(own, run, c), own.scratch);
      if (!two_passes_) continue;
      own.waiting[own.waiting_to++] = run;
      if (left_[run.unit].fetch_sub(run.count, std::memory_order_acq_rel) == run.count) {
        ratios(run.unit);
        left_[run.unit].store(-1, std::memory_order_release);
      }
      while (!shares_ && own.waiting_from < own.waiting_to && done(own.waiting[own.waiting_from]))
        finish(own, own.waiting[own.waiting_from++]);
    }
  }

  bool done(const Run& run) const { return left_[run.unit].load(std::memory_order_acquire) < 0; }

  // Where chunk c of a run waits: in the thread's ring, or where all chunks have a place.
  Waiting waiting(const Own& own, const Run& run, int64_t c) const {
    if (!two_passes_) return Waiting{};
    const int64_t item = run.unit * plan_.chunks + run.first + c;
    const int64_t slot = run.slot < 0 ? item : (run.slot + c) % ring();
    float* mixed = run.slot < 0 ? mixed_ : own.mixed;
    return Waiting{(run.slot < 0 ? text_ : own.text) + slot * wait_size(),
                   mixed == nullptr ? nullptr : mixed + slot * wait_size() / 4,
                   sums_ + item * n_ * 2 * plan_.padded_dim};
  }

  // The second pass over a run, once its unit's alpha is there; its last chunk first, which is still in the
  // cache.
  void finish(Own& own, const Run& run) {
    wait_until([&] { return done(run); });
    for (int64_t c = run.count; c-- > 0;) {
      k_.finish(plan_, run.unit % p_.batch, run.unit / p_.batch, run.first + c, waiting(own, run, c),
                alpha_ + run.unit * n_ * plan_.padded_dim);
    }
    if (run.slot >= 0) own.ring_from = run.slot + run.count;
  }

  // ortho_v2's `a` for the second pass, and for backward.
  void means() {
    const int64_t rows = plan_.chunks * kChunkRows;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < n_ * p_.batch * plan_.chunks; ++i) {
      const int64_t jb = i / plan_.chunks, first = i % plan_.chunks * kChunkRows;
      float sum[kChunkRows] = {};
      for (int64_t h = 0; h < p_.heads; ++h) {
        const float* share = plan_.share + (jb * p_.heads + h) * rows + first;
        for (int64_t r = 0; r < kChunkRows; ++r) sum[r] += share[r];
      }
      for (int64_t r = 0; r < kChunkRows; ++r) sum[r] /= static_cast<float>(p_.heads);
      std::copy(sum, sum + kChunkRows, plan_.mean + jb * rows + first);
      if (plan_.stats.share != nullptr)
        std::copy(sum, sum + std::min(kChunkRows, p_.lq - first), plan_.stats.share + jb * p_.lq + first);
    }
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
  Claims::Region* regions_ = nullptr;
  char* text_ =
      nullptr;  // places for all chunks that wait: for ortho_v2, and for what finds no room in a ring
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
