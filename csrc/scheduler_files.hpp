// Notices that a memory-mapped file was cut: reading a mapping past the end of its file kills the process (SIGBUS).
#pragma once

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if !defined(_WIN32)
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

namespace pwm_fast {

// Watches the sizes of open files. What is cut between a look and the read that follows it is not seen. On Windows a
// mapped file cannot be cut, so there is nothing to watch.
class StoreFiles {
public:
    struct File {
        std::string path;
        int64_t bytes = 0;  // that must be there
    };

    StoreFiles() = default;

    // Throws std::invalid_argument if a file cannot be opened.
    explicit StoreFiles(std::vector<File> files) : files_(std::move(files)) {
#if !defined(_WIN32)
        for (const File& file : files_) {
            const int descriptor = ::open(file.path.c_str(), O_RDONLY | O_CLOEXEC);
            if (descriptor < 0) {
                const std::string reason = file.path + " cannot be read: " + std::strerror(errno);
                close();
                throw std::invalid_argument(reason);
            }
            descriptors_.push_back(descriptor);
        }
#endif
    }
    StoreFiles(StoreFiles&& other) noexcept
        : files_(std::move(other.files_)), descriptors_(std::exchange(other.descriptors_, {})) {}
    StoreFiles& operator=(StoreFiles&&) = delete;
    ~StoreFiles() { close(); }

    // Empty if every file is as long as it must be, else the reason.
    std::string shortened() const {
#if !defined(_WIN32)
        for (size_t i = 0; i < descriptors_.size(); ++i) {
            struct stat now;
            if (::fstat(descriptors_[i], &now) != 0)
                return files_[i].path + " cannot be read: " + std::strerror(errno);
            if (now.st_size < files_[i].bytes)
                return files_[i].path + " was truncated while in use: it has " + std::to_string(now.st_size) +
                       " bytes, but its committed rows need " + std::to_string(files_[i].bytes) +
                       "; restore the file or collect the data again";
        }
#endif
        return {};
    }

private:
    void close() {
#if !defined(_WIN32)
        for (const int descriptor : descriptors_) ::close(descriptor);
#endif
        descriptors_.clear();
    }

    std::vector<File> files_;
    std::vector<int> descriptors_;
};

}  // namespace pwm_fast
