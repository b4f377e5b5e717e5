// Threads that share the work of a call.
//
// OpenMP's wait for each other and for the next region by spinning, for milliseconds. Where other processes use
// the cores, that takes the time slices which the work needs. These sleep soon, and whoever calls does what no
// other thread has begun; a forked process makes its own.
#pragma once

#include <immintrin.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

// Features of queries whose coding takes longer than waking threads.
constexpr int64_t WORTH_SHARING = 2048;

namespace {

// The numbers below n, dealt out to threads in pieces.
class Pieces {
 public:
    Pieces(int64_t n, int64_t size) : n_(n), size_(std::max<int64_t>(size, 1)) {}

    bool are_left() const { return next_.load(std::memory_order_relaxed) < n_; }

    // Take the next piece, if there is one.
    bool take(int64_t& first, int64_t& last) {
        first = next_.fetch_add(size_, std::memory_order_relaxed);
        last = std::min(n_, first + size_);
        return first < n_;
    }

 private:
    const int64_t n_, size_;
    std::atomic<int64_t> next_{0};
};

class Team {
 public:
    // Call body(0), ..., body(n - 1), each once: the first here, the others here or on other threads. None may
    // wait for another.
    template <class Body>
    static void run(int n, const Body& body) {
        if (n <= 1) {
            body(0);
            return;
        }
        Job job{[](const void* b, int i) { (*static_cast<const Body*>(b))(i); }, &body, n};
        team().share(job);
    }

 private:
    struct Job {
        void (*call)(const void*, int);
        const void* body;
        int n;
        int next = 1;                 // the first that nobody has begun
        std::atomic<int> running{0};  // on other threads
        Job* after = nullptr;
    };

    // As long as waking a thread takes.
    static constexpr std::chrono::microseconds PATIENCE{50};

    static Team& team() {
        // Never freed: threads go on while a process ends. A forked one has none of them.
        static Team* const made = new Team;
        static const int is_watched =
            pthread_atfork([] { made->mutex_.lock(); }, [] { made->mutex_.unlock(); }, [] { new (made) Team; });
        (void)is_watched;
        return *made;
    }

    void share(Job& job) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            for (; n_threads_ < job.n - 1; ++n_threads_) {
                try {
                    std::thread([this] { work(); }).detach();
                } catch (const std::system_error&) {
                    // Those that are there do it.
                    break;
                }
            }
            Job* last = first_;
            while (last && last->after) last = last->after;
            (last ? last->after : first_) = &job;
            is_open_.store(true);
            for (int i = std::min(sleeping_, job.n - 1); i > 0; --i) work_.notify_one();
        }
        int number = 0;
        do job.call(job.body, number);
        while ((number = take(job)) < job.n);
        if (spin([&] { return job.running.load() == 0; })) return;
        std::unique_lock<std::mutex> lock(mutex_);
        ++waiting_;
        done_.wait(lock, [&] { return job.running.load() == 0; });
        --waiting_;
    }

    // Return the next number of a job, n where all are taken.
    int take(Job& job) {
        std::lock_guard<std::mutex> lock(mutex_);
        return job.next < job.n ? begin(job) : job.n;
    }

    // With the mutex held.
    int begin(Job& job) {
        const int number = job.next++;
        if (job.next == job.n) {
            Job** link = &first_;
            while (*link != &job) link = &(*link)->after;
            *link = job.after;
            is_open_.store(first_ != nullptr);
        }
        return number;
    }

    void work() {
        for (;;) {
            spin([&] { return is_open_.load(std::memory_order_relaxed); });
            std::unique_lock<std::mutex> lock(mutex_);
            ++sleeping_;
            work_.wait(lock, [&] { return first_ != nullptr; });
            --sleeping_;
            Job& job = *first_;
            const int number = begin(job);
            job.running.fetch_add(1);
            lock.unlock();
            job.call(job.body, number);
            lock.lock();
            // After this the job may be gone.
            if (job.running.fetch_sub(1) == 1 && waiting_) done_.notify_all();
        }
    }

    template <class Ready>
    static bool spin(Ready ready) {
        const auto end = std::chrono::steady_clock::now() + PATIENCE;
        do {
            for (int i = 0; i < 16; ++i) {
                if (ready()) return true;
                _mm_pause();
            }
        } while (std::chrono::steady_clock::now() < end);
        return ready();
    }

    std::mutex mutex_;
    std::condition_variable work_, done_;
    Job* first_ = nullptr;  // those of which not all has been begun
    std::atomic<bool> is_open_{false};
    int n_threads_ = 0, sleeping_ = 0, waiting_ = 0;
};

}  // namespace
