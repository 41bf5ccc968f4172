// An app with the model in it: open the folder in Android Studio, or run Gradle 8.9 or later: gradle assembleDebug
plugins {
    id("com.android.application") version "8.7.3"
    id("org.jetbrains.kotlin.android") version "2.0.21"
}

val model by tasks.registering(Sync::class) {
    from(projectDir) { include("model.gguf", "generation.json", "check.json") }
    into(layout.buildDirectory.dir("model"))
}

android {
    namespace = "efficientllm.kit"
    compileSdk = 35
    ndkVersion = "27.0.12077973"
    defaultConfig {
        applicationId = "efficientllm.kit"
        minSdk = 28
        targetSdk = 35
        ndk { abiFilters += listOf("arm64-v8a", "x86_64") }
        externalNativeBuild {
            cmake { arguments += listOf("-DANDROID_STL=c++_shared", "-DCMAKE_BUILD_TYPE=Release") }
        }
    }
    externalNativeBuild { cmake { path = file("src/main/cpp/CMakeLists.txt") } }
    sourceSets { getByName("main") { assets.srcDir(layout.buildDirectory.dir("model")) } }
    androidResources { noCompress += listOf("gguf", "json") }
    packaging { jniLibs { useLegacyPackaging = true } } // as files, among which llama.cpp looks for this processor's code
    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_17
        targetCompatibility = JavaVersion.VERSION_17
    }
}

kotlin {
    compilerOptions { jvmTarget.set(org.jetbrains.kotlin.gradle.dsl.JvmTarget.JVM_17) }
}

tasks.named("preBuild") { dependsOn(model) }

dependencies {
    implementation("org.jetbrains.kotlinx:kotlinx-coroutines-android:1.9.0")
}
